"""HTML evaluation report: headline, training, classes, groups, strength, calibration, label shift, confusions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import yaml

from models.calibration import MINIMUM_IMAGES
from models.sample_size import ADVICE, from_json
from pipeline.answers.fit import Answers
from pipeline.answers.reasons import Mistake, Neighbour
from pipeline.data.class_prior import Prior
from pipeline.evaluation.metrics import GROUPS
from pipeline.evaluation.segmentation import SegmentationEvaluation, legend
from pipeline.evaluation.shifted_priors import SETS
from pipeline.report import figures
from pipeline.report.analysis import Analysis
from pipeline.report.learning_figures import confusion_heatmap, learning_curves
from pipeline.report.page import activation_uri, render_page, thumbnail

COLUMNS = ("class", "group", "train_count", "test_count", "student_balanced", "student_train", "teacher_balanced")
FORMATS = ("text", "text", "count", "count", "percent", "percent", "percent")  # of page.js
COMMAND = "python -m pipeline.evaluate"


@dataclass(frozen=True)
class Provenance:
    """Where the metrics come from. date: of the evaluation; commit: of the code; histories: network → records by epoch."""

    date: str
    commit: str
    histories: Mapping[str, Sequence[Mapping[str, float]]]


@dataclass(frozen=True)
class Evaluation:
    """Content of the evaluation page.

    metrics: network → target prior → metric; classes: rows of per_class.csv; samples: test samples with their image
    bytes; encoded: row of the test split → bytes of its image; data_facts, model_facts: (term, text) pairs; recipe:
    params as JSON; notes: missing parts and the reasons; answers: what a
    release fits on validation images, None without it; mistakes: the most confident wrong answers, and train_image: row of the
    training split → bytes of its image.
    """

    analysis: Analysis
    metrics: Mapping[str, Any]
    classes: Sequence[dict[str, Any]]
    samples: Sequence[dict[str, Any]]
    prior: Prior
    encoded: Callable[[int], bytes]
    data_facts: Sequence[tuple[str, str]]
    model_facts: Sequence[tuple[str, str]]
    recipe: Mapping[str, Any]
    provenance: Provenance
    notes: Sequence[str] = ()
    answers: Answers | None = None
    taxonomy: Mapping[str, Any] | None = None
    mistakes: Sequence[Mistake] = ()
    train_image: Callable[[int], bytes] | None = None


def render_report(evaluation: Evaluation) -> str:
    """Render the page as HTML text. With more classes only names and numbers are added, not images."""
    analysis, classes, recipe = evaluation.analysis, evaluation.classes, evaluation.recipe
    test_sizes = from_json(evaluation.metrics["student"]["balanced"]["test_images"])
    few = {name: str(size) for name, size in test_sizes.items() if size.too_few}
    rows = sorted(classes, key=lambda row: -row["train_count"])
    # The slider starts at the available strength that is nearest to the default of serving.
    strengths = [row.strength for row in analysis.strength]
    start = min(range(len(strengths)), key=lambda index: abs(strengths[index] - recipe["serving"]["strength"]))
    curves, histories = {}, evaluation.provenance.histories
    if histories:
        curves["loss"] = learning_curves(histories, "loss", "training loss")
        accuracies = learning_curves(histories, "validation_accuracy", "validation accuracy")
        if accuracies["data"]:
            curves["validation"] = accuracies
    data = {
        "figures": {
            "long-tail": figures.train_count_scatter(rows, "student_balanced", "accuracy"),
            "groups": figures.group_bars(analysis.groups),
            "strength": figures.strength_lines(analysis.strength, strengths[start]),
            "reliability": figures.reliability_lines(analysis.reliability),
            "confusion-matrix": confusion_heatmap(analysis.confusion),
        }
        | curves,
        "strength": [asdict(row) for row in analysis.strength],
        "formats": FORMATS,
        "classes": [[_short(row[column]) for column in COLUMNS] for row in rows],
    }
    return render_page(
        "report.html.jinja", data, analysis=analysis, metrics=evaluation.metrics, prior=evaluation.prior,
        top=f"top{recipe['evaluate']['top_k']}", champion=any(row["network"] == "champion" for row in analysis.groups),
        start=start, sets=list(SETS), shift=[row for row in analysis.shift.rows if "distance" not in row["prior"]],
        samples=[sample | {"uri": thumbnail(sample["bytes"])} for sample in evaluation.samples],
        image_uri=cache(lambda row: thumbnail(evaluation.encoded(row))), data_facts=evaluation.data_facts,
        model_facts=evaluation.model_facts, notes=evaluation.notes, provenance=evaluation.provenance, few=few,
        answers=evaluation.answers, taxonomy=evaluation.taxonomy, least_validation=MINIMUM_IMAGES, advice=ADVICE,
        curves=list(curves),
        mistakes=[_pictures(evaluation, each) for each in evaluation.mistakes],
        test_images=count_test_images(classes), params=recipe,
        recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), command=COMMAND,
    )  # fmt: skip


def _pictures(evaluation: Evaluation, mistake: Mistake) -> tuple[Mistake, str | None, list[tuple[str, Neighbour]]]:
    """A mistake with data URIs of its activation map, None without one, and of its nearest training images."""
    drawn, image = None, evaluation.recipe["image"]
    if mistake.map is not None:
        drawn = activation_uri(evaluation.encoded(mistake.row), mistake.map, image["size"] / image["resize_to"])
    get = evaluation.train_image
    return mistake, drawn, [(thumbnail(get(near.row)), near) for near in mistake.nearest] if get else []


def render_segmentation_report(
    result: SegmentationEvaluation, prior: Prior, params: dict[str, Any], provenance: Provenance
) -> str:
    """Render the page of task segmentation as HTML text."""
    return render_page(
        "segmentation.html.jinja", {"figures": {"strength": result.curve_figure()}}, metrics=result.metrics,
        curve=result.curve, classes=result.classes, worst=result.worst, legend=legend(prior), prior=prior, params=params,
        recipe=yaml.safe_dump(params, sort_keys=False, allow_unicode=True), provenance=provenance,
    )  # fmt: skip


def count_test_images(classes: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """Map each group, and `all`, to its number of classes and its number of test images."""
    members = {name: [row for row in classes if row["group"] == name] for name in GROUPS} | {"all": classes}
    return {name: (len(rows), sum(row["test_count"] for row in rows)) for name, rows in members.items()}


def _short(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value
