"""The evaluation report: headline, training, classes, groups, strength, calibration, label shift, confusions, next steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import yaml

from models.sample_size import ADVICE, from_json
from pipeline.data_card import SplitSizes, data_facts
from pipeline.metrics import GROUPS
from pipeline.model_card import model_facts
from pipeline.params import Params
from pipeline.prior import Prior
from pipeline.report import figures
from pipeline.report.learning_figures import confusion_heatmap, learning_curves
from pipeline.report.page import render_page
from pipeline.report.pictures import thumbnail
from pipeline.report.study import Study
from pipeline.shift_table import SETS

COLUMNS = ("class", "group", "train_count", "test_count", "student_balanced", "student_train", "teacher_balanced")
FORMS = ("text", "text", "count", "count", "percent", "percent", "percent")  # how page.js writes them
COMMAND = "python -m pipeline.evaluate"


@dataclass(frozen=True)
class Origin:
    """Where the figures come from. date: of the evaluation; commit: of the code; histories: network → its epochs."""

    date: str = "unknown"
    commit: str = "unknown"
    histories: Mapping[str, Sequence[Mapping[str, float]]] = field(default_factory=dict)


def render_report(
    found: Study,
    metrics: Mapping[str, Any],
    classes: Sequence[dict[str, Any]],
    samples: Sequence[dict[str, Any]],
    params: Params,
    prior: Prior,
    sizes: SplitSizes,
    encoded: Callable[[int], bytes],
    notes: Sequence[str] = (),
    warnings: Sequence[str] = (),
    origin: Origin = Origin(),
) -> str:
    """The page as text.

    metrics: network → target prior → metric; classes: rows of per_class.csv; samples: with their bytes; encoded: the
    bytes of a test image by its row; notes: what is not there, and why; warnings: reasons not to rely on the figures, in
    a red box before them. The page's size grows with the classes by their names and numbers alone.
    """
    pictures: dict[int, str] = {}
    sizes_tested = from_json(metrics["student"]["balanced"]["test_images"])
    few = {name: str(size) for name, size in sizes_tested.items() if size.too_few}

    def picture(row: int) -> str:
        if row not in pictures:
            pictures[row] = thumbnail(encoded(row))
        return pictures[row]

    rows = sorted(classes, key=lambda row: -row["train_count"])
    # The slider starts at the strength that is served by default, or at the nearest that it has.
    strengths = [row.strength for row in found.strength]
    start = min(range(len(strengths)), key=lambda place: abs(strengths[place] - params.serving.strength))
    curves = {}
    if origin.histories:
        curves["loss"] = learning_curves(origin.histories, "loss", "training loss")
        validated = learning_curves(origin.histories, "validation_accuracy", "validation accuracy")
        if validated["data"]:
            curves["validation"] = validated
    data = {
        "figures": {
            "long-tail": figures.by_count(rows, "student_balanced", "accuracy"),
            "groups": figures.group_bars(found.groups),
            "strength": figures.strength_lines(found.strength, strengths[start]),
            "reliability": figures.reliability_lines(found.reliability),
            "confusion-matrix": confusion_heatmap(found.confusion),
        }
        | curves,
        "strength": [asdict(row) for row in found.strength],
        "forms": FORMS,
        "classes": [[_short(row[column]) for column in COLUMNS] for row in rows],
    }
    return render_page(
        "report.html.jinja",
        data,
        found=found,
        metrics=metrics,
        params=params,
        prior=prior,
        top=f"top{params.evaluate.top_k}",
        champion=any(row["network"] == "champion" for row in found.groups),
        start=start,
        sets=list(SETS),
        shift=[row for row in found.shift.rows if "distance" not in row["prior"]],
        samples=[sample | {"uri": thumbnail(sample["bytes"])} for sample in samples],
        data_facts=data_facts(params, prior, sizes),
        model_facts=model_facts(params, prior),
        picture=picture,
        notes=notes,
        few=few,
        advice=ADVICE,
        warnings=[*warnings, *(f"{name}: {text}" for name, text in few.items())],
        origin=origin,
        curves=list(curves),
        tested=tested_images(classes),
        recipe=yaml.safe_dump(params.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        command=COMMAND,
    )


def tested_images(classes: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """Group, and `all` → its classes and its test images."""
    rows = {name: [row for row in classes if row["group"] == name] for name in GROUPS} | {"all": classes}
    return {name: (len(found), sum(row["test_count"] for row in found)) for name, found in rows.items()}


def _short(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value
