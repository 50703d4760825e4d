"""Paired comparison of champion and challenger on one test set: differences, bootstrap intervals, McNemar's tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from statistics import NormalDist

import numpy as np

from models.prior import GROUPS
from models.sample_size import ADVICE, SampleSize, sample_size
from pipeline.evaluation.intervals import bootstrap
from pipeline.evaluation.metrics import expected_calibration_error, resampled_ece
from pipeline.evaluation.predictions import GateError, Predictions, Sets
from pipeline.params import GateParams, GateRule
from pipeline.segmentation.run_areas import RunAreas


@dataclass(frozen=True)
class Measure:
    """One compared measure. difference is challenger - champion; low and high are its bootstrap interval.

    Values that were not computed are None. mcnemar: two-sided p-value over the measure's samples. passed: None if the
    rule is `none` or the measure has too few test images. images, effective: the fields of the measure's
    `models.sample_size.SampleSize`; None for measures without one, such as latency and a group without classes.
    """

    champion: float | None
    challenger: float | None
    difference: float | None
    low: float | None
    high: float | None
    mcnemar: float | None
    rule: str
    margin: float
    passed: bool | None
    images: int | None = None
    effective: float | None = None

    @property
    def size(self) -> SampleSize | None:
        """Number of test images of the measure; None if the measure has no sample size."""
        return None if self.images is None or self.effective is None else SampleSize(self.images, self.effective)

    @property
    def too_few(self) -> bool:
        """Whether the measure has too few test images for a decision."""
        return self.size is not None and self.size.too_few


@dataclass(frozen=True)
class ClassDifference:
    """Comparison of one class: both accuracies, challenger - champion with its interval, McNemar's p-value.

    won, lost: samples that only the challenger, or only the champion, predicts correctly. q: p corrected for the number
    of classes (Benjamini and Hochberg 1995): of all classes with q <= 0.05, about one in twenty differs by chance.
    """

    name: str
    group: str
    train_count: int
    test_count: int
    champion: float
    challenger: float
    difference: float
    low: float
    high: float
    won: int
    lost: int
    p: float
    q: float


def compare(challenger: Predictions, champion: Predictions, params: GateParams, ece_bins: int) -> dict[str, Measure]:
    """Compare accuracy on all, many, medium and few, calibration error, NLL and coverage; paired intervals, McNemar's tests.

    The groups are those of the champion's training prior. many, medium and few are means of class accuracies, as in
    `evaluate`: the weight of a sample is 1 / (test samples of its class). all weighs the classes by the target prior:
    with `balanced` it is the balanced accuracy. `ece few`, `nll few`, `coverage few` and so on are of one group, and have the
    rule of `ece`, `nll` and `coverage`. Raises GateError if a rule needs prediction sets that a contender lacks.
    """
    labels, classes = challenger.labels, len(champion.prior.classes)
    correct = [a.probabilities.argmax(1) == labels for a in (champion, challenger)]
    groups = np.array(champion.prior.groups)
    counts = np.bincount(labels, minlength=classes)
    target = np.array(champion.prior.p) if params.target_prior == "train" else np.ones(classes)
    weights_of_all = target[labels] / counts[labels]
    measures = {"all": _compare_accuracy(*correct, weights_of_all / weights_of_all.sum(), params, "all")}
    sizes = {"all": sample_size(counts, target)} | dict.fromkeys(("ece", "nll"), SampleSize(len(labels), len(labels)))
    for name in GROUPS:
        members = groups[labels] == name
        weights = 1 / counts[labels[members]]
        weights /= weights.sum() or 1
        measures[name] = _compare_accuracy(correct[0][members], correct[1][members], weights, params, name)
        if name in groups:
            sizes[name] = sample_size(counts[groups == name])
    measures |= _compare_calibration(challenger, champion, params, ece_bins)
    for name in GROUPS:
        if name in groups:
            rows = groups[labels] == name
            calibration = _compare_calibration(challenger, champion, params, ece_bins, rows, weights_of_all[rows])
            measures |= {f"{error} {name}": measure for error, measure in calibration.items()}
            size = sample_size(counts[groups == name], target[groups == name])
            sizes |= {f"{error} {name}": size for error in calibration}
    measures |= _compare_coverage(challenger, champion, weights_of_all, params)
    sizes |= {
        f"coverage {name}" if name != "all" else "coverage": sizes[name] for name in ("all", *GROUPS) if name in sizes
    }
    return {name: _add_sample_size(measure, sizes.get(name)) for name, measure in measures.items()}


def _compare_calibration(
    challenger: Predictions,
    champion: Predictions,
    params: GateParams,
    bins: int,
    rows: np.ndarray | slice = slice(None),
    weights: np.ndarray | None = None,
) -> dict[str, Measure]:
    """Compare ECE and NLL of some test images. weights: of each, as in `calibration_tables`; None: all equal."""
    labels = champion.labels[rows]
    if not len(labels):
        return {"ece": _not_measured(params.ece), "nll": _not_measured(params.nll)}
    weights = np.ones(len(labels)) if weights is None else weights
    pair = [each.probabilities[rows] for each in (champion, challenger)]
    losses = [weights * -np.log(np.maximum(p[np.arange(len(labels)), labels], 1e-12)) for p in pair]
    ece = _compare_error(
        *(expected_calibration_error(p, labels, bins, weights) for p in pair),
        *(resampled_ece(p, labels, bins, weights) for p in pair), len(labels), params, params.ece,
    )  # fmt: skip
    nll = _compare_error(
        *(float(loss.sum() / weights.sum()) for loss in losses),
        *(lambda index, loss=loss: loss[index].sum(axis=-1) / weights[index].sum(axis=-1) for loss in losses),
        len(labels), params, params.nll,
    )  # fmt: skip
    return {"ece": ece, "nll": nll}


def _compare_coverage(
    challenger: Predictions, champion: Predictions, weights: np.ndarray, params: GateParams
) -> dict[str, Measure]:
    """Compare by how much prediction sets stay below their wanted coverage: `coverage`, and `coverage few` and so on.

    weights: of each image in `coverage`, [N]; a group is the mean over its classes. Empty without sets, if no rule needs them.
    """
    if challenger.sets is None or champion.sets is None:
        if params.coverage.rule != "none":
            side = "challenger" if challenger.sets is None else "champion"
            raise GateError(
                f"gate.coverage is set, but the {side} has no prediction sets; evaluate it with validation images"
            )
        return {}
    labels, groups = challenger.labels, np.array(champion.prior.groups)
    measures, counts = {}, np.bincount(labels, minlength=len(groups))
    members = {"coverage": np.ones(len(labels), dtype=bool)}
    members |= {f"coverage {name}": groups[labels] == name for name in GROUPS if name in groups}
    for name, rows in members.items():
        if not rows.any():
            measures[name] = _not_measured(params.coverage)
            continue
        share = weights[rows] if name == "coverage" else 1 / counts[labels[rows]]
        gaps = [_coverage_gap(sets, rows, share / share.mean()) for sets in (champion.sets, challenger.sets)]
        every, samples = np.arange(rows.sum()), int(rows.sum())
        measures[name] = _compare_error(*(float(gap(every)) for gap in gaps), *gaps, samples, params, params.coverage)
    return measures


def _coverage_gap(sets: Sets, rows: np.ndarray, weights: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """How far the mean coverage of resampled rows is below the wanted one; 0 above it, because wider sets are not better."""
    covered = sets.covered[rows] * weights
    return lambda index: np.maximum(sets.coverage - covered[index].mean(axis=-1), 0.0)


def compare_areas(challenger: RunAreas, champion: RunAreas, params: GateParams) -> dict[str, Measure]:
    """Compare mIoU over all classes and over each group, of task segmentation; paired intervals over images.

    The groups are those of the champion's prior. There is no test of McNemar's kind and no rule for calibration.
    """
    groups, images = np.array(champion.prior.groups), len(champion.sample_ids)
    whole, measures = np.arange(images)[None], {}
    for name in ("all", *GROUPS):
        classes = groups == name if name != "all" else np.ones(len(groups), dtype=bool)
        rule = getattr(params, name)
        if not classes.any():
            measures[name] = _not_measured(rule)
            continue
        before, after = champion.mean_iou(classes), challenger.mean_iou(classes)
        low, high = paired_interval(lambda index, b=before, a=after: a(index) - b(index), images, params)
        values = float(before(whole)[0]), float(after(whole)[0])
        difference = values[1] - values[0]
        passed = _passes(rule, difference, low, high, None, 1 - params.confidence)
        measures[name] = Measure(*values, difference, low, high, None, rule.rule, rule.margin, passed)
        measures[name] = _add_sample_size(measures[name], SampleSize(images, images))
    return measures


def too_few_images(measures: dict[str, Measure]) -> list[str]:
    """One line for each rule whose measure has too few test images, with the remedy; without the groups of `not_judged`."""
    return [
        f"{name}: {measure.size}; {ADVICE}, or set gate.{name}.rule: none"
        for name, measure in measures.items()
        if measure.rule != "none" and measure.too_few and not is_group_of_rule(name)
    ]


def not_judged(measures: dict[str, Measure]) -> list[str]:
    """One line for each shot group that gate.ece, gate.nll or gate.coverage does not judge, because it has too few test images.

    Such a rule holds for all images and for each group with enough of them; a small group does not prevent the promotion.
    """
    return [
        f"{name}: {measure.size}"
        for name, measure in measures.items()
        if measure.rule != "none" and measure.too_few and is_group_of_rule(name)
    ]


def is_group_of_rule(name: str) -> bool:
    """Whether a measure is one shot group of a rule that has several, such as `ece few`."""
    return " " in name


def _add_sample_size(measure: Measure, size: SampleSize | None) -> Measure:
    """Add the sample size to a measure; passed becomes None if the test images are too few."""
    if size is None:
        return measure
    passed = None if size.too_few else measure.passed
    return replace(measure, images=size.images, effective=size.effective, passed=passed)


def _not_measured(rule: GateRule) -> Measure:
    """A group without test samples has no value, so its rule cannot refuse."""
    return Measure(None, None, None, None, None, None, rule.rule, rule.margin, None)


def _compare_accuracy(
    champion: np.ndarray, challenger: np.ndarray, weights: np.ndarray, params: GateParams, name: str
) -> Measure:
    rule = getattr(params, name)
    if not len(weights):
        return _not_measured(rule)
    change = (challenger.astype(np.float64) - champion) * weights * len(weights)
    low, high = paired_interval(lambda index: change[index].mean(axis=-1), len(change), params)
    p = mcnemar(champion, challenger, weights, params)
    difference = float(change.mean())
    passed = _passes(rule, difference, low, high, p, 1 - params.confidence)
    before, after = float(weights @ champion), float(weights @ challenger)
    return Measure(before, after, difference, low, high, p, rule.rule, rule.margin, passed)


def _compare_error(
    before: float,
    after: float,
    champion: Callable[[np.ndarray], np.ndarray],
    challenger: Callable[[np.ndarray], np.ndarray],
    samples: int,
    params: GateParams,
    rule: GateRule,
) -> Measure:
    """Compare a value that must not increase. before, after: its values; champion, challenger: the same of resampled rows."""
    low, high = paired_interval(lambda index: challenger(index) - champion(index), samples, params)
    # The rules are written for values that must not decrease.
    passed = _passes(rule, before - after, -high, -low, None, 1 - params.confidence)
    return Measure(before, after, after - before, low, high, None, rule.rule, rule.margin, passed)


def paired_interval(
    statistic: Callable[[np.ndarray], np.ndarray], samples: int, params: GateParams
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic of sample indices; equal seed and size give equal draws."""
    if samples < 2:  # the bootstrap of one sample has zero width; return the widest interval
        return -1.0, 1.0
    return bootstrap(statistic, samples, params.resamples, params.confidence, params.seed)


def compare_classes(challenger: Predictions, champion: Predictions, confidence: float) -> list[ClassDifference]:
    """Compare the accuracy of every class that has test samples; classes, groups and counts of the champion's prior.

    The interval is that of Agresti and Min (2005), which adds half a sample to each of the four outcomes of a pair. A
    bootstrap interval has zero width if no sample of a class differs, and classes have few test samples.
    """
    from scipy.stats import false_discovery_control

    labels, classes = challenger.labels, len(champion.prior.classes)
    before, after = (a.probabilities.argmax(1) == labels for a in (champion, challenger))
    tested = np.bincount(labels, minlength=classes)
    won, lost, before, after = (
        np.bincount(labels[rows], minlength=classes) for rows in (after & ~before, before & ~after, before, after)
    )
    centre = (won - lost) / (tested + 2)
    spread = np.sqrt(np.maximum((won + lost + 1) - (won - lost) ** 2 / (tested + 2), 0)) / (tested + 2)
    half = NormalDist().inv_cdf((1 + confidence) / 2) * spread
    prior, tested_classes = champion.prior, np.flatnonzero(tested)
    p = [_exact_mcnemar(int(won[c]), int(lost[c])) for c in tested_classes]
    return [
        ClassDifference(
            prior.classes[c], prior.groups[c], prior.counts[c], int(tested[c]), float(before[c] / tested[c]),
            float(after[c] / tested[c]), float((won[c] - lost[c]) / tested[c]), max(-1.0, float(centre[c] - half[c])),
            min(1.0, float(centre[c] + half[c])), int(won[c]), int(lost[c]), p[index], float(q),
        )
        for index, (c, q) in enumerate(zip(tested_classes, false_discovery_control(p), strict=True))
    ]  # fmt: skip


def mcnemar(champion: np.ndarray, challenger: np.ndarray, weights: np.ndarray, params: GateParams) -> float:
    """Two-sided McNemar p-value for samples that only one of the two models predicts correctly; 1 if there are none.

    weights: float [N], one per sample. If the samples that differ have equal weights, the exact test is used. Otherwise
    its permutation form: the share of params.resamples random sign vectors with at least as large a weighted
    difference.
    """
    differ = champion != challenger
    signs, weight = np.where(challenger[differ], 1.0, -1.0), weights[differ]
    if not len(weight) or np.ptp(weight) <= 1e-9 * weight.max():
        return _exact_mcnemar(int((signs > 0).sum()), int((signs < 0).sum()))
    random, at_least = np.random.default_rng(params.seed), 0
    observed = abs(signs @ weight) - 1e-9 * weight.sum()
    rows = max(1, 4_000_000 // len(weight))
    for start in range(0, params.resamples, rows):
        drawn = random.integers(0, 2, (min(rows, params.resamples - start), len(weight)), dtype=np.int8)
        at_least += int((np.abs((2.0 * drawn - 1) @ weight) >= observed).sum())
    return (1 + at_least) / (1 + params.resamples)


@cache
def _exact_mcnemar(won: int, lost: int) -> float:
    from scipy.stats import binomtest

    return float(binomtest(won, lost + won).pvalue) if lost + won else 1.0


def _passes(rule: GateRule, difference: float, low: float, high: float, p: float | None, alpha: float) -> bool | None:
    if rule.rule == "none":
        return None
    if rule.rule == "estimate":
        return difference >= -rule.margin - 1e-12  # tolerance for rounding of the sum of weights
    if rule.rule == "proven":
        return low >= -rule.margin - 1e-12
    # beyond_noise: both tests must agree, because the bootstrap interval is too narrow if few samples differ.
    return not (high < -rule.margin and (p is None or p <= alpha))
