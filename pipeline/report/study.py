"""What the evaluation page shows, computed once from the networks' logits; the CSV files for DVC hold the same rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.artifacts import as_csv, write_file
from pipeline.comparison import Answers
from pipeline.errors import DataError
from pipeline.intervals import NOTHING, Estimate, weighted_accuracy, wilson
from pipeline.metrics import GROUPS
from pipeline.params import Params
from pipeline.prior import Prior
from pipeline.report.mistakes import ClassResult, ConfusionPair, confusion_pairs, extreme_classes
from pipeline.report.reliability import Reliability, reliability
from pipeline.report.strength import StrengthRow, strength_sweep
from pipeline.shift_table import SETS, shift_table

DRAWS = 20  # test subsets of each shifted set
SHIFT_WORK = 20_000_000  # images x classes x draws; with more, fewer subsets are drawn


@dataclass(frozen=True)
class Shift:
    """The table of the five shifted test sets, a row per way of adjusting; or why there is none."""

    rows: list[dict[str, Any]]
    draws: int
    missing: str | None = None


@dataclass(frozen=True)
class Study:
    """headline: of the student, by name; groups: rows of network, group, accuracy, low, high; the rest as in their modules."""

    headline: dict[str, Estimate]
    groups: list[dict[str, Any]]
    strength: list[StrengthRow]
    reliability: Reliability
    shift: Shift
    pairs: list[ConfusionPair]
    worst: list[ClassResult]
    best: list[ClassResult]


def study(
    logits: Mapping[str, np.ndarray],
    labels: np.ndarray,
    prior: Prior,
    params: Params,
    *,
    validation: tuple[np.ndarray, np.ndarray] | None = None,
    champion: Answers | None = None,
) -> Study:
    """Everything that the page shows. logits: `teacher` and `student`, unadjusted, [N,C]; labels: [N].

    validation: the student's logits and the labels that the temperature is fitted on. champion: its balanced answers for
    the same test set.
    """
    student, seed = logits["student"], params.data.seed
    predicted = {name: values.argmax(axis=1) for name, values in logits.items()}
    calibration = reliability(student, labels, validation, params.evaluate.ece_bins)
    worst, best = extreme_classes(predicted["student"], labels, prior)
    answered = {name: (found, labels) for name, found in predicted.items()}
    if champion is not None:
        answered["champion"] = champion.probabilities.argmax(axis=1), champion.labels
    return Study(
        headline=_headline(student, labels, prior, calibration, seed),
        groups=[row for name, (found, truth) in answered.items() for row in _groups(name, found, truth, prior, seed)],
        strength=strength_sweep(student, labels, prior),
        reliability=calibration,
        shift=_shift(student, labels, prior.counts, seed),
        pairs=confusion_pairs(predicted["student"], labels, prior),
        worst=worst,
        best=best,
    )


def _headline(
    logits: np.ndarray, labels: np.ndarray, prior: Prior, calibration: Reliability, seed: int
) -> dict[str, Estimate]:
    classes = len(prior.classes)
    tested = np.bincount(labels, minlength=classes)
    adjusted = (logits + np.array(prior.log_prior)).argmax(axis=1)
    right, right_train = (
        np.bincount(labels[found == labels], minlength=classes) for found in (logits.argmax(axis=1), adjusted)
    )
    groups = {
        name: weighted_accuracy(right, tested, np.array([group == name for group in prior.groups], float), seed=seed)
        for name in GROUPS
    }
    return {
        "balanced": weighted_accuracy(right, tested, np.ones(classes), seed=seed),
        "train": weighted_accuracy(right_train, tested, np.array(prior.p), seed=seed),
        **groups,
        "all": wilson(int(right.sum()), int(tested.sum())),
        "ece": calibration.before.ece,
        "ece_after": calibration.after.ece if calibration.after else NOTHING,
    }


def _groups(network: str, predicted: np.ndarray, labels: np.ndarray, prior: Prior, seed: int) -> list[dict[str, Any]]:
    classes = len(prior.classes)
    tested = np.bincount(labels, minlength=classes)
    right = np.bincount(labels[predicted == labels], minlength=classes)
    inside = {"all classes": np.ones(classes)}
    inside |= {name: np.array([group == name for group in prior.groups], float) for name in GROUPS}
    rows = []
    for name, weights in inside.items():
        found = weighted_accuracy(right, tested, weights, seed=seed)
        rows.append({"network": network, "group": name, "accuracy": found.value, "low": found.low, "high": found.high})
    return rows


def _shift(logits: np.ndarray, labels: np.ndarray, counts: list[int], seed: int) -> Shift:
    draws = max(1, min(DRAWS, SHIFT_WORK // logits.size))
    try:
        return Shift(shift_table(logits, labels, counts, draws=draws, seed=seed), draws)
    except DataError as error:
        return Shift([], 0, str(error))


def write_plots(found: Study, folder: Path) -> None:
    """The figures as CSV files that dvc.yaml names: strength, reliability, groups and shift."""
    write_file(folder / "strength.csv", as_csv([asdict(row) for row in found.strength]))
    sides = {"before": found.reliability.before, "after": found.reliability.after}
    write_file(
        folder / "reliability.csv",
        as_csv(
            [
                {"temperature": name, "confidence": each.confidence, "accuracy": each.accuracy, "answers": each.answers}
                for name, side in sides.items()
                for each in (side.bins if side else [])
            ]
        ),
    )
    rows = [row for row in found.groups if row["accuracy"] is not None]
    write_file(folder / "groups.csv", as_csv([{"bar": f"{row['group']}, {row['network']}"} | row for row in rows]))
    shift = [
        {"log10_ratio": round(float(np.log10(ratio)), 3), "test_prior": name}
        | {row["prior"].replace(" ", "_"): row[name] for row in found.shift.rows if "distance" not in row["prior"]}
        for name, ratio in SETS.items()
    ]
    write_file(folder / "shift.csv", as_csv(shift))
