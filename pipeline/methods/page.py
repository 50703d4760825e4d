"""Page and JSON of a comparison of methods."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any, NamedTuple

from pipeline.evaluation.intervals import CONFIDENCE, Estimate
from pipeline.methods.comparison import Comparison, Missing
from pipeline.methods.estimates import MEASURES
from pipeline.methods.rows import Row, rows_of
from pipeline.report.figures import Figure, axis, escape_label, layout, straight_line
from pipeline.report.page import render_page
from serving.shared.terminal import counted

KINDS = {
    "class loss": ("many", "circle"), "contrast": ("few", "diamond"), "experts": ("train", "triangle-up"),
    "second stage": ("medium", "square"), "own recipe": ("ink", "star"),
}  # fmt: skip
HEIGHT, TOP, BOTTOM = 460, 12, 52  # pixels of the chart of cost, and of its margins in `layout`
WIDTH = 960  # pixels between the margins where the page has its full width
LINE, LETTER, MARK = 14, 6.6, 7  # pixels: height of a name, its width per letter, half the size of a point
# Pixels to the right or left and down by which a name is moved from its point, the nearest first.
SHIFTS = sorted(
    ((x, y) for x in range(14, 300, 60) for y in range(-300, 301, 10)), key=lambda shift: math.hypot(*shift)
)
NAMED = 4  # methods whose names stand in a figure at the top
NOT_CHOSEN = (
    "Every network is that of its last epoch, and nothing was chosen on the test split: a second stage fits tau and scale on "
    "validation images. To choose a method by this table is a choice on the test split, and makes its accuracy optimistic."
)


def as_json(comparison: Comparison, reference: str, command: str) -> dict[str, Any]:
    """Content of comparison.json."""
    project, rows = comparison.project, rows_of(comparison, reference)
    return {
        "command": command, "reference": reference, "seeds": comparison.seeds, "confidence": CONFIDENCE,
        "test_images": len(project.labels), "training_images": sum(project.prior.counts),
        "classes": {name: project.prior.groups.count(name) for name in MEASURES[1:]} | {"all": len(project.prior.classes)},
        "note": NOT_CHOSEN, "complete": comparison.done == comparison.planned,
        "methods": [_row_json(row) for row in rows], "equal_cost": _equal_json(comparison, reference),
        "missing": [asdict(entry) for entry in comparison.missing],
        "left_out": [asdict(entry) for entry in comparison.left_out],
    }  # fmt: skip


def _equal_json(comparison: Comparison, reference: str) -> dict[str, Any] | None:
    rows = rows_of(comparison, reference, equal=True)
    return (
        {"method": comparison.equal_cost, "methods": [_row_json(row) for row in rows]}
        if comparison.equal_cost
        else None
    )


def _row_json(row: Row) -> dict[str, Any]:
    method = row.method
    return {
        "method": method.name, "kind": method.kind, "paper": method.paper, "predicts": method.predicts, "seeds": row.seeds,
        "epochs": row.epochs, "behind": asdict(row.behind) if row.behind else None,
        "accuracy": {name: asdict(value) for name, value in row.accuracy.items()},
        "by_seed": row.by_seed, "difference": {name: asdict(value) for name, value in row.difference.items()},
        "ece": {"mean": row.ece, "std": row.ece_std}, "seconds": row.seconds,
        "cost": asdict(row.cost) if row.cost else None, "served": asdict(row.served),
    }  # fmt: skip


def render_methods(comparison: Comparison, reference: str, command: str) -> str:
    """The page as HTML text. command: the command line in the footer."""
    rows, project = rows_of(comparison, reference), comparison.project
    best = max(rows, key=lambda row: row.accuracy["all"].value or 0.0, default=None)
    figures = {"cost": cost_chart(rows)} if any(row.cost for row in rows) else {}
    if any(row.difference for row in rows):
        figures["differences"] = differences_chart(rows, reference)
    return render_page(
        "methods.html.jinja", {"figures": figures}, rows=rows, best=best, reference=reference, command=command,
        measures=MEASURES, project=project, params=project.params, comparison=comparison, note=NOT_CHOSEN,
        groups={name: project.prior.groups.count(name) for name in MEASURES[1:]}, confidence=100 * CONFIDENCE,
        images=sum(project.prior.counts), figures=figures, short=short, interval=interval,
        done=comparison.done, running=comparison.planned - comparison.done - len(comparison.missing), names=names,
        equal=rows_of(comparison, reference, equal=True),
        unfinished=missing_lines(comparison.missing), left_out=missing_lines(comparison.left_out), counted=counted,
        surer=[row for row in rows if row.difference and (row.difference["all"].low or 0) > 0],
        worse=[row for row in rows if row.difference and (row.difference["all"].high or 0) < 0],
    )  # fmt: skip


def names(rows: list[Row]) -> str:
    """The names of up to NAMED methods, and the number of the others."""
    if not rows:
        return "no method beyond its interval"
    more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
    return ", ".join(row.method.name for row in rows[:NAMED]) + more


def missing_lines(missing: list[Missing]) -> list[str]:
    """A line for each method and reason, with the seeds that are missing."""
    seeds: dict[tuple[str, str], list[str]] = {}
    for entry in missing:
        seeds.setdefault((entry.method, entry.reason), []).extend([] if entry.seed is None else [str(entry.seed)])
    reasons = {"budget": "not started, because it would exceed --budget"}
    return [
        method + (f", seed {', '.join(numbers)}" if numbers else "") + f": {reasons.get(reason, reason)}"
        for (method, reason), numbers in seeds.items()
    ]


def short(number: float) -> str:
    """A count in three digits with its unit: 12.3 k, 4.56 M, 7.89 G, 1.23 T."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 999.5 * size else f"{number / size:,.0f} {unit}"
    return f"{number:.0f}"


def interval(estimate: Estimate, signed: bool = False) -> str:
    """An interval in percent, or in points with signs; n/a without test images."""
    if estimate.low is None or estimate.high is None:
        return "n/a"
    low, high = (f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}" for value in (estimate.low, estimate.high))
    return f"{low} to {high}".replace("-", "−")


def cost_chart(rows: list[Row]) -> Figure:
    """Accuracy of each method against the multiply-accumulates of its training, with the names of the methods."""
    shown = [row for row in rows if row.cost and row.accuracy["all"].value is not None]
    traces = []
    for kind, (colour, symbol) in KINDS.items():
        members = [row for row in shown if row.method.kind == kind]
        if members:
            traces.append(_points(members, kind, colour, symbol))
    shares = [100 * (row.accuracy["all"].value or 0) for row in shown]
    logs = [math.log10(max(row.cost.macs, 1)) for row in shown if row.cost]
    margin = max(0.15 * (max(logs) - min(logs)), 0.1)
    x_range, y_range = (min(logs) - margin, max(logs) + 2 * margin), (min(shares) - 1, max(shares) + 1)
    x = axis(
        "multiply-accumulates of the training, logarithmic", type="log", range=x_range, tickformat="~s", dtick="D2"
    )
    y = axis("accuracy, mean of the classes", ticksuffix="%", range=y_range)
    return {"data": traces, "layout": layout(x, y, HEIGHT, annotations=_labels(shown, x_range, y_range))}


def _points(rows: list[Row], kind: str, colour: str, symbol: str) -> dict[str, Any]:
    values = [row.accuracy["all"] for row in rows]
    return {
        "type": "scatter", "mode": "markers", "name": kind, "x": [row.cost.macs for row in rows if row.cost],
        "y": [100 * (value.value or 0) for value in values], "text": [escape_label(row.method.name) for row in rows],
        "marker": {"color": f"var(--{colour})", "symbol": symbol, "size": 10},
        "hovertemplate": "<b>%{text}</b><br>%{y:.1f}%<br>%{x:.3s} multiply-accumulates<extra>" + kind + "</extra>",
    }  # fmt: skip


def _labels(rows: list[Row], x_range: tuple[float, float], y_range: tuple[float, float]) -> list[dict[str, Any]]:
    """Annotations with the names of the methods beside their points."""
    values = [(math.log10(max(row.cost.macs, 1)), 100 * (row.accuracy["all"].value or 0)) for row in rows if row.cost]
    across, down = WIDTH / (x_range[1] - x_range[0]), (HEIGHT - TOP - BOTTOM) / (y_range[1] - y_range[0])
    points = [((x - x_range[0]) * across, (y_range[1] - y) * down) for x, y in values]
    names = [escape_label(row.method.name, 32) for row in rows]
    return [
        {
            "x": value[0], "y": value[1], "text": name, "showarrow": True, "arrowhead": 0, "arrowwidth": 0.6,
            "arrowcolor": "var(--axis)", "standoff": 5, "ay": round(box.top + LINE / 2 - y),
            "ax": round(box.left - x if box.left > x else box.right - x),
            "xanchor": "left" if box.left > x else "right", "font": {"size": 12, "color": "var(--ink)"},
        }
        for value, name, (x, y), box in zip(values, names, points, name_boxes(points, names), strict=True)
    ]  # fmt: skip


class Box(NamedTuple):
    """A rectangle of a chart in pixels from its top left corner."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        """Whether the two have a common part."""
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom


def name_boxes(points: list[tuple[float, float]], names: list[str]) -> list[Box]:
    """Where the names of points stand: to the right or left of their point, as near as leaves points and names readable."""
    height, taken = HEIGHT - TOP - BOTTOM, [Box(x - MARK, y - MARK, x + MARK, y + MARK) for x, y in points]
    boxes = []
    for (x, y), name in zip(points, names, strict=True):
        width = LETTER * len(name)
        starts = [(left, y + dy - LINE / 2) for dx, dy in SHIFTS for left in (x + dx, x - dx - width)]
        places = [Box(left, top, left + width, top + LINE) for left, top in starts]
        inside = [box for box in places if min(box) >= 0 and box.right <= WIDTH and box.bottom <= height]
        free = (box for box in inside if not any(box.overlaps(other) for other in taken))
        boxes.append(next(free, (inside or places)[0]))
        taken.append(boxes[-1])
    return boxes


def differences_chart(rows: list[Row], reference: str) -> Figure:
    """Differences of all classes from the reference with their intervals, one row per method."""
    shown = sorted((row for row in rows if row.difference), key=lambda row: row.difference["all"].value or 0.0)
    values = [row.difference["all"] for row in shown]
    trace = {
        "type": "scatter", "mode": "markers", "x": [100 * (value.value or 0) for value in values],
        "y": [escape_label(row.method.name, 32) for row in shown], "marker": {"color": "var(--student)", "size": 9},
        "error_x": {
            "type": "data", "symmetric": False, "color": "var(--student)", "thickness": 2, "width": 4,
            "array": [100 * ((value.high or 0) - (value.value or 0)) for value in values],
            "arrayminus": [100 * ((value.value or 0) - (value.low or 0)) for value in values],
        },
        "hovertemplate": "<b>%{y}</b> %{x:+.1f} points<extra></extra>", "showlegend": False,
    }  # fmt: skip
    x = axis(f"difference from {escape_label(reference, 32)}, points", tickformat="+~g")
    y = axis("", type="category")
    return {"data": [trace], "layout": layout(x, y, 110 + 26 * len(shown), shapes=[straight_line("x", 0)])}
