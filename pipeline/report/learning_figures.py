"""Learning curves and confusion heatmap as plotly figures; colours and axes as in figures.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.figures import SHARE, Figure, axis, escape_label, layout
from pipeline.report.mistakes import ConfusionMatrix

NUMBERED = 15  # largest number of classes for which the cells of the confusion matrix show counts


def learning_curves(histories: Mapping[str, Sequence[Mapping[str, float]]], key: str, title: str) -> Figure:
    """Line chart of a value by epoch, one line per network. histories: network → records of metrics.jsonl."""
    share = key == "validation_accuracy"
    traces = [
        {
            "type": "scatter", "mode": "lines" if len(rows) > 1 else "markers", "name": network,
            "x": [row["epoch"] for row in rows], "y": [round(row[key], 5) for row in rows],
            "line": {"color": f"var(--{network})", "width": 2.2, "dash": "dot" if network == "teacher" else "solid"},
            "hovertemplate": "epoch %{x}: <b>%{y:" + (".1%" if share else ".4f") + f"}}</b><extra>{network}</extra>",
        }
        for network, history in histories.items()
        if (rows := [row for row in history if key in row])
    ]  # fmt: skip
    y = axis(title, tickformat=SHARE, range=[-0.03, 1.03]) if share else axis(title, rangemode="tozero")
    short = max((len(rows) for rows in histories.values()), default=0) <= 10
    x = axis("epoch", **({"dtick": 1} if short else {}))  # else plotly puts ticks between few epochs
    return {"data": traces, "layout": layout(x, y, 320, showlegend=True)}


def confusion_heatmap(matrix: ConfusionMatrix) -> Figure:
    """Heatmap of a confusion matrix: share of each actual class (row) that was predicted as each class (column)."""
    names, index = matrix.classes, list(range(len(matrix.classes)))
    ticks: dict[str, Any] = {
        "tickvals": index, "ticktext": [escape_label(name, 18) for name in names], "showgrid": False,
    }  # fmt: skip
    shares = [
        [round(count / max(tested, 1), 4) for count in row]
        for row, tested in zip(matrix.counts, matrix.tested, strict=True)
    ]
    trace = {
        "type": "heatmap", "x": index, "y": index, "z": shares, "zmin": 0, "zmax": 1, "xgap": 1, "ygap": 1,
        "colorscale": [[0, "var(--card)"], [1, "var(--accent)"]], "text": matrix.counts,
        "customdata": [[[escape_label(actual), escape_label(predicted)] for predicted in names] for actual in names],
        "hovertemplate": "%{customdata[0]} predicted as %{customdata[1]}<br><b>%{text:,} images</b>, "
        "%{z:.1%} of the class<extra></extra>",
        "colorbar": {"tickformat": SHARE, "outlinewidth": 0, "thickness": 12},
    } | ({"texttemplate": "%{text}"} if len(names) <= NUMBERED else {})  # fmt: skip
    x, y = axis("predicted class", tickangle=-45, **ticks), axis("actual class", autorange="reversed", **ticks)
    return {"data": [trace], "layout": layout(x, y, 200 + 24 * len(names))}
