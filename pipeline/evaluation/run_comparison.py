"""Compare two runs on one test set: differences over all classes, by group and by class, intervals and p-values."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pipeline.evaluation.comparison import ClassDifference, Measure, compare, compare_classes, is_group_of_rule
from pipeline.evaluation.predictions import Predictions, check_comparable
from pipeline.params import GateParams


@dataclass(frozen=True)
class Comparison:
    """Result of `compare_runs`. Differences are after - before, of accuracies or of the ECE.

    before, after: the names that the caller gave to the runs.
    """

    before: str
    after: str
    samples: int
    target_prior: str
    confidence: float
    measures: dict[str, Measure]
    classes: list[ClassDifference]

    @property
    def warnings(self) -> list[str]:
        """One line for each measure with too few test images; `ece few` and so on have the images of `few`."""
        few = [name for name, measure in self.measures.items() if measure.too_few and not is_group_of_rule(name)]
        return [f"{name}: {self.measures[name].size}" for name in few]

    def changed(self, most: int) -> list[ClassDifference]:
        """At most `most` classes with the smallest p-values; classes without a changed sample are excluded."""
        changed = [row for row in self.classes if row.won or row.lost]
        return sorted(changed, key=lambda row: (row.p, -abs(row.difference)))[:most]


def compare_runs(
    before: Predictions, after: Predictions, names: tuple[str, str], params: GateParams, ece_bins: int
) -> Comparison:
    """Compare two runs. The groups and training counts are those of `before`.

    Raises GateError if the runs have different classes or test samples.
    """
    check_comparable(after, before, f"{names[1]} and {names[0]}")
    measures = compare(after, before, params, ece_bins)
    classes = compare_classes(after, before, params.confidence)
    return Comparison(*names, len(after.labels), params.target_prior, params.confidence, measures, classes)


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON-serialisable values: every measure and every class."""
    return asdict(comparison) | {
        "warnings": comparison.warnings,
        "measures": {name: _measure_json(measure) for name, measure in comparison.measures.items()},
        "classes": [_class_json(row) for row in comparison.classes],
    }


def _measure_json(measure: Measure) -> dict[str, Any]:
    return {
        "before": measure.champion, "after": measure.challenger, "difference": measure.difference,
        "low": measure.low, "high": measure.high, "p": measure.mcnemar, "images": measure.images, "too_few": measure.too_few,
    }  # fmt: skip


def _class_json(row: ClassDifference) -> dict[str, Any]:
    values = asdict(row)
    return {"class": values.pop("name"), "before": values.pop("champion"), "after": values.pop("challenger")} | values
