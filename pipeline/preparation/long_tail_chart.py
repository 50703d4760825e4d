"""Draw the long tail: training images of each class, largest class first, as an SVG file and on the terminal."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import jinja2
import numpy as np
from rich.bar import Bar
from rich.table import Table

from models.prior import FEW_BELOW, GROUPS, MANY_ABOVE, shot_group
from pipeline.shared.artifacts import write_file
from serving.shared.terminal import cell, counted

COLOURS = {"many": "#4477aa", "medium": "#ccbb44", "few": "#ee6677"}
ROWS = 20  # of the chart on the terminal
NAME_WIDTH, BAR_WIDTH = 24, 40  # columns of the terminal; with the numbers they fit into 80
LEFT, TOP, WIDTH, HEIGHT = 70, 40, 710, 350  # of the chart's area in the SVG, in pixels
AXIS_MIN = 0.5  # images at the lower end of the logarithmic axis, so that a class of one image is visible

CHART = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 450" font-family="sans-serif" font-size="13">
<rect width="800" height="450" fill="#fff"/>
<text x="{{ left + width / 2 }}" y="24" text-anchor="middle" font-size="15">{{ title }}</text>
{% for group in groups %}
<path d="{{ group.path }}" fill="{{ group.colour }}"/>
{% endfor %}
{% for images, y in ticks %}
<path d="M{{ left - 5 }} {{ y }}h5" stroke="#000"/>
<text x="{{ left - 9 }}" y="{{ y + 4 }}" text-anchor="end">{{ images }}</text>
{% endfor %}
{% for y in limits %}
<path d="M{{ left }} {{ y }}h{{ width }}" stroke="#666" stroke-dasharray="6 4"/>
{% endfor %}
<rect x="{{ left + width - 288 }}" y="{{ top + 5 }}" width="283" height="{{ 20 * groups | length + 4 }}" fill="#fff"/>
{% for group in groups %}
<rect x="{{ left + width - 280 }}" y="{{ top + 12 + 20 * loop.index0 }}" width="12" height="12" fill="{{ group.colour }}"/>
<text x="{{ left + width - 262 }}" y="{{ top + 23 + 20 * loop.index0 }}">{{ group.label }}</text>
{% endfor %}
<path d="M{{ left }} {{ top }}v{{ height }}h{{ width }}v-{{ height }}z" fill="none" stroke="#000"/>
<text x="{{ left + width / 2 }}" y="{{ top + height + 32 }}" text-anchor="middle">{{ classes }} classes, largest first</text>
<text transform="translate(18 {{ top + height / 2 }}) rotate(-90)" text-anchor="middle">training images</text>
</svg>
"""


def draw_long_tail(counts: list[int], title: str, path: Path) -> None:
    """Write the chart as an SVG file: class sizes on a logarithmic scale, coloured by shot group."""
    sizes = sorted(counts, reverse=True)
    top, bottom = math.log10(max(sizes[0], 1) * 1.5), math.log10(AXIS_MIN)

    def height_of(images: float) -> float:
        return round(TOP + HEIGHT * (top - math.log10(max(images, AXIS_MIN))) / (top - bottom), 1)

    groups, start = [], 0
    for group in GROUPS:  # sizes are sorted, so the classes of a group are adjacent
        members = [size for size in sizes if shot_group(size) == group]
        outline, end = f"M{LEFT + WIDTH * start / len(sizes):.1f} {height_of(AXIS_MIN)}", start
        for size, run in itertools.groupby(members):
            end += len(list(run))
            outline += f"V{height_of(size)}H{LEFT + WIDTH * end / len(sizes):.1f}"
        label = f"{group}: {counted(len(members), 'class')}, {counted(sum(members), 'image')}"
        groups.append({"path": f"{outline}V{height_of(AXIS_MIN)}z", "colour": COLOURS[group], "label": label})
        start = end
    ticks = [(f"{10**power:,}", height_of(10**power)) for power in range(math.floor(top) + 1)]
    limits = [height_of(limit) for limit in (MANY_ABOVE, FEW_BELOW) if math.log10(limit) < top]
    chart = jinja2.Environment(
        autoescape=True, trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    ).from_string(CHART)
    write_file(
        path,
        chart.render(
            title=title, groups=groups, ticks=ticks, limits=limits, classes=f"{len(sizes):,}",
            left=LEFT, top=TOP, width=WIDTH, height=HEIGHT,
        ),
    )  # fmt: skip


def show_long_tail(counts: list[int], classes: list[str]) -> Table:
    """Table of the long tail for the terminal: classes by size in up to 20 rows, each with a bar.

    The scale is logarithmic, so that small classes are visible: the length of a bar is log(1 + mean images of its row).
    """
    order = np.argsort(-np.array(counts), kind="stable")
    sizes = np.array(counts)[order]
    parts = np.array_split(sizes, min(ROWS, len(sizes)))
    longest = np.log1p(sizes[0])
    grouped = len(parts) < len(sizes)
    table = Table(box=None, padding=(0, 1), pad_edge=False, title_justify="left", title_style="")
    table.add_column("class", max_width=NAME_WIDTH, no_wrap=True, overflow="ellipsis")
    if grouped:
        table.add_column("classes", justify="right", no_wrap=True)
    table.add_column("images", justify="right", no_wrap=True)
    table.add_column(f"log scale, full length {sizes[0]:,} images", width=BAR_WIDTH, no_wrap=True)
    start = 0
    for part in parts:
        names = [cell(classes[c]) for c in order[start : start + len(part)]]
        number = f"{part[0]:,}" if part[0] == part[-1] else f"{part[0]:,}…{part[-1]:,}"
        length = float(np.log1p(part.mean()) / longest) if longest else 0.0
        bar = Bar(1, 0, length, color=COLOURS[shot_group(int(np.median(part)))])
        name = names[0] if len(part) == 1 else f"{names[0]} … {names[-1]}"
        table.add_row(name, *([f"{len(part):,}"] if grouped else []), number, bar)
        start += len(part)
    return table
