"""Page and JSON of a comparison of methods."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

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
HEIGHT, TOP, BOTTOM = 460, 40, 60  # pixels of the chart of cost, and of its margins
LABEL_HEIGHT = 15  # pixels
NAMED = 4  # methods whose names stand in a figure at the top
COLUMN = 0.12  # points within this share of the axis have their labels in one column
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
    """Annotations with the names of the methods; those of one cost are moved apart vertically."""
    height, span = HEIGHT - TOP - BOTTOM, y_range[1] - y_range[0]
    points = [
        (math.log10(max(row.cost.macs, 1)), height * (y_range[1] - 100 * (row.accuracy["all"].value or 0)) / span, row)
        for row in rows
        if row.cost
    ]
    columns: list[list[tuple[float, float, Row]]] = []
    for point in sorted(points, key=lambda point: point[0]):
        if not columns or point[0] - columns[-1][0][0] > COLUMN * (x_range[1] - x_range[0]):
            columns.append([])
        columns[-1].append(point)
    labels = []
    for column in columns:
        bottom = -math.inf
        last = max(x for x, _, _ in column)
        pixels = sorted(column, key=lambda point: point[1])
        # From the top: each label at its point or below the previous one; the column ends inside the chart.
        room = height - LABEL_HEIGHT * len(pixels)
        for number, (x, y, row) in enumerate(pixels):
            at = max(bottom + LABEL_HEIGHT, min(y, room + LABEL_HEIGHT * (number + 1)))
            bottom = at
            labels.append(
                {
                    "x": x, "y": 100 * (row.accuracy["all"].value or 0), "text": escape_label(row.method.name, 32),
                    "showarrow": True, "arrowhead": 0, "arrowwidth": 0.6, "arrowcolor": "var(--axis)", "standoff": 5,
                    "ax": 24 + round(600 * (last - x) / (x_range[1] - x_range[0])), "ay": round(at - y), "xanchor": "left",
                    "font": {"size": 12, "color": "var(--ink)"},
                }
            )  # fmt: skip
    return labels


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
