"""Two runs on one test set: what differs in all, by group and by class, and how much of it may be chance."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pipeline.evaluation.comparison import ClassDifference, Measure, compare, compare_classes
from pipeline.evaluation.predictions import Answers, check_comparable
from pipeline.params import GateParams


@dataclass(frozen=True)
class Comparison:
    """before, after: the runs as the caller named them; differences are after - before, of accuracies or of the ECE."""

    before: str
    after: str
    samples: int
    target_prior: str
    confidence: float
    measures: dict[str, Measure]
    classes: list[ClassDifference]

    @property
    def warnings(self) -> list[str]:
        """A line for each measure that rests on too few test images."""
        return [f"{name}: {measure.size}" for name, measure in self.measures.items() if measure.too_few]

    def changed(self, most: int) -> list[ClassDifference]:
        """The classes whose change is least likely chance, at most so many; classes without a changed sample are none."""
        moved = [row for row in self.classes if row.won or row.lost]
        return sorted(moved, key=lambda row: (row.p, -abs(row.difference)))[:most]


def compare_runs(
    before: Answers, after: Answers, names: tuple[str, str], params: GateParams, ece_bins: int
) -> Comparison:
    """Compare two runs. The groups and training counts are those of `before`.

    Raises GateError when the runs have other classes or were tested on other samples.
    """
    check_comparable(after, before, f"{names[1]} and {names[0]}")
    measures = compare(after, before, params, ece_bins)
    classes = compare_classes(after, before, params.confidence)
    return Comparison(*names, len(after.labels), params.target_prior, params.confidence, measures, classes)


def as_json(found: Comparison) -> dict[str, Any]:
    """The comparison for programs: every measure and every class."""
    measures = {name: _measure(measure) for name, measure in found.measures.items()}
    return asdict(found) | {
        "warnings": found.warnings,
        "measures": measures,
        "classes": [_class(row) for row in found.classes],
    }


def _measure(measure: Measure) -> dict[str, Any]:
    return {
        "before": measure.champion, "after": measure.challenger, "difference": measure.difference,
        "low": measure.low, "high": measure.high, "p": measure.mcnemar, "images": measure.images, "too_few": measure.too_few,
    }  # fmt: skip


def _class(row: ClassDifference) -> dict[str, Any]:
    values = asdict(row)
    return {"class": values.pop("name"), "before": values.pop("champion"), "after": values.pop("challenger")} | values
