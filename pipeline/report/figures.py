"""Charts of the HTML pages as plotly figures (data and layout), which plotly.js draws in the browser.

A colour is a CSS variable of the page, such as `var(--ink)`; page.js inserts its value, so that a chart follows the
light, dark and print styles. Colours are Okabe and Ito's, and groups also differ by symbol.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from pipeline.evaluation.metrics import GROUPS
from pipeline.report.reliability import Reliability, ReliabilityCurve
from pipeline.report.strength import StrengthRow

Figure = dict[str, Any]
SYMBOLS = {"many": "circle", "medium": "diamond", "few": "square"}
NETWORKS = ("champion", "teacher", "student")
SHARE = ".0%"
POINTS = "+~g"


def axis(title: str, **more: Any) -> dict[str, Any]:
    """Plotly axis in the style of the page."""
    return {
        "title": {"text": title, "font": {"size": 13}, "standoff": 10}, "gridcolor": "var(--line)", "automargin": True,
        "linecolor": "var(--axis)", "zeroline": False, "fixedrange": True, **more,
    }  # fmt: skip


def layout(x: dict[str, Any], y: dict[str, Any], height: int = 380, **more: Any) -> dict[str, Any]:
    """Plotly layout in the style of the page; x and y are axes."""
    return {
        "xaxis": x, "yaxis": y, "height": height, "autosize": True, "dragmode": False, "hovermode": "closest",
        "margin": {"l": 56, "r": 12, "t": 12, "b": 52}, "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "var(--soft)"},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"color": "var(--ink)"}},
        "hoverlabel": {"bgcolor": "var(--card)", "bordercolor": "var(--axis)", "font": {"color": "var(--ink)"}}, **more,
    }  # fmt: skip


def straight_line(axis: str, value: float, colour: str = "axis", width: float = 1) -> dict[str, Any]:
    """Layout shape of a line across the chart at a value of the axis `x` or `y`."""
    other = "y" if axis == "x" else "x"
    ends = {f"{axis}0": value, f"{axis}1": value, f"{other}ref": "paper", f"{other}0": 0, f"{other}1": 1}
    return {"type": "line", **ends, "line": {"color": f"var(--{colour})", "width": width}}


def escape_label(name: str, longest: int = 80) -> str:
    """Escape and shorten a name for plotly labels, which interpret some HTML tags."""
    return escape(name if len(name) <= longest else f"{name[: longest - 1]}…", quote=False)


def train_count_scatter(classes: Sequence[dict[str, Any]], key: str, title: str, change: bool = False) -> Figure:
    """Scatter chart of a value of each class against its training images. change: the value is a difference."""
    traces: list[dict[str, Any]] = []
    for group in GROUPS:
        shown = [row for row in classes if row["group"] == group and row[key] is not None]
        if not shown:
            continue
        traces.append(
            {
                "type": "scatter", "mode": "markers", "name": f"{group} ({len(shown):,})",
                # A class may have no training image (prior.smoothing), and a logarithmic axis has no zero.
                "x": [max(row["train_count"], 0.5) for row in shown], "y": [round(100 * row[key], 3) for row in shown],
                "text": [escape_label(row["class"]) for row in shown],
                "marker": {
                    "color": f"var(--{group})", "symbol": SYMBOLS[group], "size": 9 if len(classes) <= 300 else 5,
                    "opacity": 0.9 if len(classes) <= 300 else 0.55, "line": {"color": "var(--card)", "width": 0.5},
                },
                "hovertemplate": f"<b>%{{text}}</b><br>%{{x:,}} training images<br>{title} "
                + ("%{y:+.1f} points" if change else "%{y:.1f}%") + f"<extra>{group}</extra>",
            }
        )  # fmt: skip
    y = axis(f"{title}, points", tickformat=POINTS) if change else axis(title, ticksuffix="%", range=[-3, 105])
    largest = max(row["train_count"] for row in classes)
    ticks = [step * 10**power for power in range(len(str(largest))) for step in (1, 2, 5)]
    if largest > 5000:  # with four or more decades, one tick per decade
        ticks = ticks[::3]
    x = axis("training images, logarithmic", type="log", tickvals=ticks, ticktext=[f"{tick:,}" for tick in ticks])
    return {"data": traces, "layout": layout(x, y, 400, shapes=[straight_line("y", 0)] if change else [])}


def group_bars(rows: Sequence[dict[str, Any]]) -> Figure:
    """Bar chart of the accuracy of each group by network, with intervals; rows: network, group, accuracy, low, high."""
    traces = []
    for network in NETWORKS:
        shown = [row for row in rows if row["network"] == network and row["accuracy"] is not None]
        if shown:
            traces.append(
                {
                    "type": "bar", "name": network, "x": [row["group"] for row in shown],
                    "y": [row["accuracy"] for row in shown], "marker": {"color": f"var(--{network})"},
                    "error_y": {
                        "type": "data", "symmetric": False, "color": "var(--ink)", "thickness": 1.2, "width": 3,
                        "array": [row["high"] - row["accuracy"] for row in shown],
                        "arrayminus": [row["accuracy"] - row["low"] for row in shown],
                    },
                    "customdata": [[row["low"], row["high"]] for row in shown],
                    "hovertemplate": "%{x}: <b>%{y:.1%}</b> (%{customdata[0]:.1%} to %{customdata[1]:.1%})"
                    f"<extra>{network}</extra>",
                }
            )  # fmt: skip
    y = axis("accuracy", tickformat=SHARE, range=[0, 1.03])
    return {"data": traces, "layout": layout(axis(""), y, 340, barmode="group", bargap=0.35, bargroupgap=0.08)}


def strength_lines(rows: Sequence[StrengthRow], chosen: float) -> Figure:
    """Line chart of accuracy under both test priors by strength; shapes[0] is the line that the slider moves."""
    strengths = [row.strength for row in rows]
    sides = {"balanced": ("balanced test prior", "solid"), "train": ("train test prior", "dash")}
    traces = [
        {
            "type": "scatter", "mode": "lines", "name": name, "x": strengths,
            "y": [round(getattr(row, key), 5) for row in rows],
            "line": {"color": f"var(--{key})", "width": 2.5, "dash": dash},
            "hovertemplate": "strength %{x:.2f}: <b>%{y:.1%}</b><extra>" + name + "</extra>",
        }
        for key, (name, dash) in sides.items()
    ]  # fmt: skip
    x, y = axis("strength of the adjustment", dtick=0.5), axis("accuracy", tickformat=SHARE)
    return {"data": traces, "layout": layout(x, y, 340, shapes=[straight_line("x", chosen, "ink", 1.5)])}


def reliability_lines(reliability: Reliability) -> Figure:
    """Reliability diagram before and after temperature scaling; the area of a point is its share of the predictions."""
    sides = {"before": reliability.before, f"after, temperature {reliability.temperature or 1:.2f}": reliability.after}
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter", "mode": "lines", "x": [0, 1], "y": [0, 1], "name": "perfect", "hoverinfo": "skip",
            "line": {"color": "var(--axis)", "width": 1.5, "dash": "dot"},
        }
    ]  # fmt: skip
    for (name, side), colour, symbol in zip(sides.items(), ("before", "after"), ("square", "circle"), strict=True):
        if side is not None:
            traces.append(_reliability(name, side, f"var(--{colour})", symbol))
    x, y = (axis(title, range=[-0.03, 1.05], tickformat=SHARE) for title in ("confidence", "accuracy"))
    return {"data": traces, "layout": layout(x, y, 400)}


def _reliability(name: str, side: ReliabilityCurve, colour: str, symbol: str) -> dict[str, Any]:
    counts = [each.count for each in side.bins]
    sizes = [round(5 + 17 * math.sqrt(count / sum(counts)), 1) for count in counts]
    return {
        "type": "scatter", "mode": "lines+markers", "name": f"{name}: ECE {side.ece.value:.1%}",
        "x": [each.confidence for each in side.bins], "y": [each.accuracy for each in side.bins],
        "customdata": counts, "line": {"color": colour, "width": 1.3},
        "marker": {"color": colour, "symbol": symbol, "size": sizes},
        "hovertemplate": "confidence %{x:.1%}, accuracy <b>%{y:.1%}</b><br>%{customdata:,} predictions"
        f"<extra>{name}</extra>",
    }  # fmt: skip


def difference_chart(rows: Sequence[dict[str, Any]], after: str) -> Figure:
    """Chart of differences with intervals, one row per measure; rows: measure, difference, low, high."""
    shown = [row for row in rows if row["difference"] is not None][::-1]
    difference, low, high = ([100 * row[key] for row in shown] for key in ("difference", "low", "high"))
    trace = {
        "type": "scatter", "mode": "markers", "x": difference, "y": [row["measure"] for row in shown],
        "marker": {"color": "var(--student)", "size": 10},
        "error_x": {
            "type": "data", "symmetric": False, "color": "var(--student)", "thickness": 2, "width": 5,
            "array": [end - value for end, value in zip(high, difference, strict=True)],
            "arrayminus": [value - end for end, value in zip(low, difference, strict=True)],
        },
        "customdata": [list(ends) for ends in zip(low, high, strict=True)],
        "hovertemplate": "%{y}: <b>%{x:+.1f}</b> points (%{customdata[0]:+.1f} to %{customdata[1]:+.1f})<extra></extra>",
    }  # fmt: skip
    x, y = axis(f"percentage points gained by {escape_label(after, 40)}", tickformat=POINTS), axis("", type="category")
    return {"data": [trace], "layout": layout(x, y, 90 + 42 * len(shown), shapes=[straight_line("x", 0)])}
