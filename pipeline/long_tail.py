"""A picture of the long tail: training images of each class, largest first, as a PNG and in the terminal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.bar import Bar
from rich.table import Table

from models.prior import FEW_BELOW, MANY_ABOVE, shot_group
from serving.terminal import cell, counted

COLOURS = {"many": "#4477aa", "medium": "#ccbb44", "few": "#ee6677"}
ROWS = 20  # of the picture in the terminal
NAME_WIDTH, BAR_WIDTH = 24, 40  # columns of the terminal; with the numbers they fit into 80


def draw_long_tail(counts: list[int], title: str, path: Path) -> None:
    """Write the picture as a PNG: classes by size on a logarithmic scale, coloured by shot group."""
    from matplotlib.figure import Figure  # here: only `data check` draws

    sizes = np.sort(np.array(counts))[::-1]
    groups = [shot_group(int(size)) for size in sizes]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(sizes))
    for group, colour in COLOURS.items():
        mine = np.array([found == group for found in groups])
        label = f"{group}: {counted(int(mine.sum()), 'class')}, {counted(int(sizes[mine].sum()), 'image')}"
        axes.fill_between(places, sizes, 0.5, where=mine, step="mid", color=colour, label=label)
        if len(sizes) <= 200:  # single classes can be told apart
            axes.bar(places[mine], sizes[mine], width=1.0, color=colour)
    for limit in (MANY_ABOVE, FEW_BELOW):
        axes.axhline(limit, color="0.4", linewidth=0.8, linestyle="--")
    axes.set(yscale="log", ylim=(0.5, max(sizes[0], 1) * 1.5), xlim=(-0.5, len(sizes) - 0.5), title=title)
    axes.set(xlabel="classes, largest first", ylabel="training images")
    axes.legend()
    figure.savefig(path, format="png", metadata={"Software": None})


def show_long_tail(counts: list[int], classes: list[str]) -> Table:
    """The long tail for a terminal: classes by size in up to 20 rows, each with a bar, and the bars' scale.

    The scale is logarithmic, so that small classes can be seen: a bar's length is log(1 + images), of a row's mean.
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
