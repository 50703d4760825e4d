"""Prediction sets of a release: validation scores for the manifest; coverage and size on the test split, by group and class."""

from __future__ import annotations

from typing import Any

import numpy as np

from models.calibration import MINIMUM_IMAGES
from models.decisions import SetThresholds, images_needed, largest_coverage, members_of
from models.prior import GROUPS, softmax
from pipeline.data.class_prior import Prior

INTERPOLATION = 0.75  # least weight of a class's own quantile, chosen on validation images (docs/answers.md)
MAX_SCORES = 20_000  # in a manifest, 200 kB; of more validation images a part of each large class is used
DIGITS = 6  # significant digits of a score
REPORTED = 0.9  # coverage of the report if params name none
METHODS = {"one threshold": 0.0, "served": None, "a threshold per class": 1.0}  # weight of the own quantile


def set_scores(logits: np.ndarray, labels: np.ndarray) -> list[list[float]] | None:
    """The scores of the validation images of each class, for the manifest; None with fewer than MINIMUM_IMAGES images.

    logits: calibrated and balanced, [N,C]; labels: [N]. A score is the probability of the image's class under the balanced
    prior. Above MAX_SCORES a random part of each large class is used, which keeps the coverage valid.
    """
    if len(labels) < MINIMUM_IMAGES:
        return None
    own = softmax(logits)[np.arange(len(labels)), labels]
    counts = np.bincount(labels, minlength=logits.shape[1])
    most = int(counts.max())
    while np.minimum(counts, most).sum() > MAX_SCORES and most > 1:
        most -= max(1, most // 20)
    random = np.random.default_rng(0)
    chosen = [random.permutation(own[labels == c])[:most] for c in range(len(counts))]
    return [[float(f"{score:.{DIGITS}g}") for score in scores] for scores in chosen]


def set_record(
    scores: list[list[float]] | None,
    logits: np.ndarray,
    labels: np.ndarray,
    prior: Prior,
    coverage: float | None,
) -> dict[str, Any] | None:
    """The JSON content of the sets that evaluation writes for export and report; None without scores.

    scores: of `set_scores`. logits, labels: of the test split, calibrated and balanced. coverage: the default of the release;
    the tables use REPORTED without one, and at most what the number of validation images supports. too_few: classes with
    fewer validation images than their own quantile needs.
    """
    if scores is None:
        return None
    images = sum(map(len, scores))
    shown = min(coverage or REPORTED, np.floor(1000 * largest_coverage(images)) / 1000)
    needed = images_needed(shown)
    tables, by_class = set_tables(scores, logits, labels, prior, shown)
    return {
        "scores": scores, "interpolation": INTERPOLATION, "images": images, "coverage": shown, "needed": needed,
        "too_few": sum(len(values) < needed for values in scores), "tables": tables, "classes": by_class,
    }  # fmt: skip


def covered_columns(
    record: dict[str, Any] | None, logits: np.ndarray, labels: np.ndarray, prior: Prior
) -> dict[str, np.ndarray]:
    """Whether the served set of each test image has its class, bool [N], by target prior; empty without a set_record.

    logits: calibrated and balanced, [N,C], of the test split.
    """
    if record is None:
        return {}
    source, balanced, classes = (
        SetThresholds(record["scores"], record["interpolation"]),
        softmax(logits),
        len(prior.classes),
    )
    columns = {}
    for target, q in (("balanced", np.full(classes, 1 / classes)), ("train", np.array(prior.p))):
        thresholds = source.thresholds(record["coverage"], q)
        inside, _ = members_of(balanced, softmax(logits + np.log(q)), thresholds)
        columns[target] = inside[np.arange(len(labels)), labels]
    return columns


def set_tables(
    scores: list[list[float]], logits: np.ndarray, labels: np.ndarray, prior: Prior, coverage: float
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Target prior → method → group → coverage and mean set size; and coverage and size of each class as served, balanced.

    `all` weighs the test images as if their classes followed the target prior; a shot group is the mean over its classes.
    `below_half` is the share of the classes with test images that are in fewer than half of their own sets.
    """
    classes = len(prior.classes)
    counts = np.bincount(labels, minlength=classes)
    tested = np.flatnonzero(counts)
    balanced, by_class, tables = softmax(logits), [], {}
    source = SetThresholds(scores, INTERPOLATION)
    for target, q in (("balanced", np.full(classes, 1 / classes)), ("train", np.array(prior.p))):
        most_probable = softmax(logits + np.log(q))
        tables[target] = {}
        for method, weight in METHODS.items():
            thresholds = source.thresholds(coverage, q, weight)
            inside, _ = members_of(balanced, most_probable, thresholds)
            right, sizes = inside[np.arange(len(labels)), labels].astype(float), inside.sum(axis=1)
            covered, size = (np.bincount(labels, values, classes) / np.maximum(counts, 1) for values in (right, sizes))
            members = {"all": q[tested], **{g: np.array(prior.groups)[tested] == g for g in GROUPS}}
            tables[target][method] = {
                group: {
                    "coverage": float(np.average(covered[tested], weights=weights)),
                    "size": float(np.average(size[tested], weights=weights)),
                }
                for group, weights in members.items()
                if weights.any()
            } | {"below_half": float((covered[tested] < 0.5).mean())}
            if (target, method) == ("balanced", "served"):
                by_class = [
                    {"class": prior.classes[c], "group": prior.groups[c], "validation_count": len(scores[c]),
                     "test_count": int(counts[c]), "coverage": float(covered[c]), "size": float(size[c])}
                    for c in tested
                ]  # fmt: skip
    return tables, by_class
