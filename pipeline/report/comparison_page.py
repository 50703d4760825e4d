"""HTML page of `tailor compare`: differences of two runs over all classes, by group and by class."""

from __future__ import annotations

from typing import Any

from models.prior import GROUPS
from pipeline.evaluation.comparison import is_group_of_rule
from pipeline.evaluation.run_comparison import Comparison, as_json
from pipeline.report import figures
from pipeline.report.page import render_page

FORMATS = {
    "class": "text", "group": "text", "train_count": "count", "test_count": "count", "before": "percent", "after": "percent",
    "difference": "points", "low": "points", "high": "points", "p": "p", "q": "p",
}  # fmt: skip
SHOWN = 8  # classes named at each end
NAMES = {"all": "all classes", "ece": "calibration error", "nll": "NLL", "coverage": "missing coverage"}


def render_comparison(comparison: Comparison, command: str) -> str:
    """Render the page as HTML text. command: the command line that is shown in the footer."""
    content = as_json(comparison)
    classes: list[dict[str, Any]] = sorted(content["classes"], key=lambda row: -row["train_count"])
    measures = [
        {"measure": _title(name), "group_of_rule": is_group_of_rule(name)} | values
        for name, values in content["measures"].items()
    ]
    changed = [row for row in classes if row["won"] or row["lost"]]
    by_change = sorted(changed, key=lambda row: (row["difference"], row["p"]))
    accuracies = [row for row in measures if row["measure"] in (NAMES["all"], *GROUPS)]
    data = {
        "figures": {
            "differences": figures.difference_chart(accuracies, comparison.after),
            "by-class": figures.train_count_scatter(classes, "difference", "difference", change=True),
        },
        "formats": list(FORMATS.values()),
        "classes": [[_short(row[column]) for column in FORMATS] for row in classes],
    }
    return render_page(
        "compare.html.jinja", data, comparison=comparison, measures=measures, command=command, changed=len(changed),
        worse=[row for row in by_change[:SHOWN] if row["difference"] < 0],
        better=[row for row in by_change[::-1][:SHOWN] if row["difference"] > 0],
        significant=sum(row["q"] <= 1 - comparison.confidence for row in classes),
    )  # fmt: skip


def _title(measure: str) -> str:
    kind, _, group = measure.partition(" ")
    return NAMES.get(kind, kind) + (group and f", {group}")


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
