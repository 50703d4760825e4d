"""Analyse the networks' test predictions for the evaluation page, and write the same values as CSV for DVC."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.prior import adjust_logits
from pipeline.data.class_prior import Prior
from pipeline.evaluation.intervals import NO_ESTIMATE, Estimate, weighted_accuracy
from pipeline.evaluation.metrics import GROUPS, count_correct
from pipeline.evaluation.predictions import Predictions
from pipeline.evaluation.shifted_priors import SETS, shift_table
from pipeline.report.mistakes import (
    ClassResult,
    ConfusionMatrix,
    ConfusionPair,
    confusion_matrix,
    confusion_pairs,
    extreme_classes,
)
from pipeline.report.reliability import Reliability, reliability
from pipeline.report.strength import StrengthRow, strength_sweep
from pipeline.shared.artifacts import as_csv, write_file
from pipeline.shared.errors import DataError

ALL = "all classes"
DRAWS = 20  # test subsets of each shifted set
MAX_SHIFT_WORK = 10_000_000  # images x classes x draws; above it fewer subsets are drawn
SHIFT_COLUMNS = {  # row of the shift table → column of shift.csv
    "no adjustment": "no_adjustment",
    "known prior": "known_prior",
    "estimated prior (EM)": "estimated_by_em",
    "estimated prior (MAP)": "estimated_by_map",
}
SHIFT_TOLERANCE = 1e-2  # nats: a seventh of a standard error, and a third of the time
# Nats per class, if the table at full precision would take minutes. Noise alone is worth half a nat per class. With
# 1,000 classes an accuracy may change by at most 0.34 points (tests/pipeline/evaluation/test_shifted_priors.py).
COARSE_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Shift:
    """Table of the five shifted test sets, one row per method of adjustment. missing: why there is no table."""

    rows: list[dict[str, Any]]
    draws: int
    missing: str | None = None


@dataclass(frozen=True)
class SeenGroups:
    """Test images whose groups (data.group) are in the training split, or are not: their numbers and mean class accuracy."""

    name: str
    groups: int
    images: int
    classes: int
    accuracy: Estimate


@dataclass(frozen=True)
class Analysis:
    """Result of `analyse_predictions`.

    headline: the student's accuracy by group, and `train`, `ece`, `ece_after`. groups: rows of network, group,
    accuracy, low, high. seen: of the student; empty without data.group. The other fields are defined in their modules.
    """

    headline: dict[str, Estimate]
    groups: list[dict[str, Any]]
    strength: list[StrengthRow]
    reliability: Reliability
    shift: Shift
    confusion: ConfusionMatrix
    pairs: list[ConfusionPair]
    worst: list[ClassResult]
    best: list[ClassResult]
    seen: list[SeenGroups]


def analyse_predictions(
    logits: Mapping[str, np.ndarray],
    labels: np.ndarray,
    prior: Prior,
    ece_bins: int,
    seed: int,
    *,
    temperature: float | None = None,
    champion: Predictions | None = None,
    groups: tuple[Sequence[str], set[str]] | None = None,
    draws: int = DRAWS,
) -> Analysis:
    """Compute the content of the evaluation page. logits: `teacher` and `student`, balanced, [N,C]; labels: [N].

    seed: of the draws. temperature: of the student, fitted on validation images; None without one. champion: its balanced
    predictions on the same test set. groups: of each test image, and those of the training split.
    draws: test subsets of each shifted set; fewer if they would take minutes.
    """
    student = logits["student"]
    predicted = {name: (values.argmax(axis=1), labels) for name, values in logits.items()}
    if champion is not None:
        predicted["champion"] = champion.probabilities.argmax(axis=1), champion.labels
    by_shots = {name: _group_accuracies(*pair, prior, seed) for name, pair in predicted.items()}
    calibration = reliability(student, labels, temperature, ece_bins)
    worst, best = extreme_classes(*predicted["student"], prior)
    return Analysis(
        headline=by_shots["student"] | _headline(student, labels, prior, calibration, seed),
        groups=[
            {"network": network, "group": group, "accuracy": estimate.value, "low": estimate.low, "high": estimate.high}
            for network, by_group in by_shots.items()
            for group, estimate in by_group.items()
        ],
        strength=strength_sweep(student, labels, prior),
        reliability=calibration,
        shift=_shift(student, labels, prior.counts, seed, draws),
        confusion=confusion_matrix(*predicted["student"], prior),
        pairs=confusion_pairs(*predicted["student"], prior),
        worst=worst,
        best=best,
        seen=_seen_groups(*predicted["student"], len(prior.classes), *groups, seed) if groups else [],
    )


def _seen_groups(
    predicted: np.ndarray, labels: np.ndarray, classes: int, names: Sequence[str], trained: set[str], seed: int
) -> list[SeenGroups]:
    is_seen = np.array([name in trained for name in names], dtype=bool)
    rows = []
    for name, chosen in (("seen in training", is_seen), ("not seen in training", ~is_seen)):
        correct, tested = count_correct(predicted[chosen], labels[chosen], classes)
        groups = len({names[index] for index in np.flatnonzero(chosen)})
        accuracy = weighted_accuracy(correct, tested, np.ones(classes), seed=seed)
        rows.append(SeenGroups(name, groups, int(chosen.sum()), int((tested > 0).sum()), accuracy))
    return rows


def _headline(
    logits: np.ndarray, labels: np.ndarray, prior: Prior, calibration: Reliability, seed: int
) -> dict[str, Estimate]:
    log_prior = np.array(prior.log_prior, dtype=logits.dtype)  # with ten thousand classes, float64 takes gigabytes
    adjusted = adjust_logits(logits, log_prior, 1.0).argmax(axis=1)
    correct, tested = count_correct(adjusted, labels, len(prior.classes))
    return {
        "train": weighted_accuracy(correct, tested, np.array(prior.p), seed=seed),
        "ece": calibration.before.ece,
        "ece_after": calibration.after.ece if calibration.after else NO_ESTIMATE,
    }


def _group_accuracies(predicted: np.ndarray, labels: np.ndarray, prior: Prior, seed: int) -> dict[str, Estimate]:
    correct, tested = count_correct(predicted, labels, len(prior.classes))
    members = {ALL: np.ones(len(tested))}
    members |= {name: np.array([group == name for group in prior.groups], float) for name in GROUPS}
    return {name: weighted_accuracy(correct, tested, weights, seed=seed) for name, weights in members.items()}


def _shift(logits: np.ndarray, labels: np.ndarray, counts: list[int], seed: int, most: int) -> Shift:
    draws = max(1, min(most, MAX_SHIFT_WORK // logits.size))
    tolerance = COARSE_TOLERANCE * len(counts) if draws < most else SHIFT_TOLERANCE
    try:
        return Shift(shift_table(logits, labels, counts, draws=draws, seed=seed, tolerance=tolerance), draws)
    except DataError as error:
        return Shift([], 0, str(error))


def write_plots(analysis: Analysis, folder: Path) -> None:
    """Write the CSV files of the plots in dvc.yaml: strength, reliability, groups and shift."""
    write_file(folder / "strength.csv", as_csv([asdict(row) for row in analysis.strength]))
    sides = {"before": analysis.reliability.before, "after": analysis.reliability.after}
    bins = [
        {"confidence": each.confidence, "before": None, "after": None, "answers": each.count, name: each.accuracy}
        for name, side in sides.items()
        for each in (side.bins if side else [])
    ]
    write_file(folder / "reliability.csv", as_csv(sorted(bins, key=lambda row: row["confidence"])))
    rows = [row for row in analysis.groups if row["accuracy"] is not None]
    write_file(folder / "groups.csv", as_csv([{"bar": f"{row['group']}, {row['network']}"} | row for row in rows]))
    shift = [
        {"log10_ratio": round(float(np.log10(ratio)), 3), "test_prior": name}
        | {SHIFT_COLUMNS[row["prior"]]: row[name] for row in analysis.shift.rows if row["prior"] in SHIFT_COLUMNS}
        for name, ratio in SETS.items()
    ]
    write_file(folder / "shift.csv", as_csv(shift))
