"""Metrics against scikit-learn; calibration error against a bin-by-bin reference; weights against repeated samples."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as reference

from pipeline.evaluation.metrics import (
    adjusted_probabilities,
    expected_calibration_error,
    mean_of,
    negative_log_likelihood,
    per_class_accuracy,
    prediction_metrics,
    top_k_accuracy,
)


@st.composite
def answered(draw, all_classes=False):
    classes, samples = draw(st.integers(3, 7)), draw(st.integers(8, 60))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    labels = random.integers(0, classes, samples)
    if all_classes:
        labels[:classes] = np.arange(classes)
    probabilities = random.dirichlet(np.full(classes, 0.5), samples)
    return probabilities, labels, classes


@given(answered())
def test_accuracies_equal_scikit_learns(case):
    probabilities, labels, classes = case
    predicted = probabilities.argmax(1)
    by_class = per_class_accuracy(predicted, labels, classes)
    for c in range(classes):
        expected = reference.recall_score(labels, predicted, labels=[c], average=None, zero_division=np.nan)[0]
        assert by_class[c] == (None if np.isnan(expected) else pytest.approx(expected))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about predicted classes that are not in the labels
        assert mean_of(by_class) == pytest.approx(reference.balanced_accuracy_score(labels, predicted))


@given(st.integers(1, 40), st.integers(2, 30), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_top_k_by_counting_equals_top_k_by_sorting_also_with_ties(samples, classes, k, seed):
    random = np.random.default_rng(seed)
    probabilities, labels = random.integers(0, 4, (samples, classes)) / 4, random.integers(0, classes, samples)
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    assert top_k_accuracy(probabilities, labels, k) == (best == labels[:, None]).any(axis=1).mean()


@given(answered(all_classes=True), st.integers(1, 7))
def test_top_k_and_log_loss_equal_scikit_learns(case, k):
    probabilities, labels, classes = case
    probabilities = np.maximum(probabilities, 1e-9)  # above the floor of the loss, which the reference does not have
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    known = np.arange(classes)
    if k < classes:
        assert top_k_accuracy(probabilities, labels, k) == pytest.approx(
            reference.top_k_accuracy_score(labels, probabilities, k=k, labels=known)
        )
    else:
        assert top_k_accuracy(probabilities, labels, k) == 1.0
    assert negative_log_likelihood(probabilities, labels) == pytest.approx(
        reference.log_loss(labels, probabilities, labels=known), rel=1e-6
    )


def slow_ece(probabilities, labels, bins):
    """Reference ECE: sample by sample into bins (a, b]; gaps weighted by the share of the bin."""
    members = [[] for _ in range(bins)]
    for row, label in zip(probabilities, labels, strict=True):
        confidence = max(row)
        for number in range(bins):
            if number / bins < confidence <= (number + 1) / bins:
                members[number].append((confidence, float(np.argmax(row) == label)))
    return math.fsum(
        abs(math.fsum(right for _, right in pairs) / len(pairs) - math.fsum(sure for sure, _ in pairs) / len(pairs))
        * len(pairs) / len(labels)
        for pairs in members if pairs
    )  # fmt: skip


@given(answered(), st.sampled_from([2, 10, 15]))
def test_the_ece_equals_a_reference_computed_bin_by_bin(case, bins):
    probabilities, labels, _ = case
    ece = expected_calibration_error(probabilities, labels, bins)
    assert ece == pytest.approx(slow_ece(probabilities, labels, bins), abs=1e-12)


def test_a_confidence_on_the_edge_of_two_bins_belongs_to_the_lower_one():
    # Two bins of width .5: .5 is in the first, slightly more in the second, and 1 in the last.
    probabilities = np.array([[0.5, 0.5], [0.75, 0.25], [1.0, 0.0]])
    labels = np.array([0, 1, 0])
    assert expected_calibration_error(probabilities, labels, 2) == pytest.approx((abs(1 - 0.5) + abs(1 - 1.75)) / 3)


@given(answered(), st.data())
def test_a_weight_equals_that_many_copies_of_its_sample(case, data):
    probabilities, labels, _ = case
    weights = np.array(data.draw(st.lists(st.integers(1, 4), min_size=len(labels), max_size=len(labels))))
    copies = np.repeat(np.arange(len(labels)), weights)
    for metric, more in ((negative_log_likelihood, ()), (expected_calibration_error, (15,))):
        weighted = metric(probabilities, labels, *more, weights=weights.astype(float))
        assert weighted == pytest.approx(metric(probabilities[copies], labels[copies], *more), abs=1e-12)


@given(answered(all_classes=True), st.data())
def test_metrics_at_a_target_prior_equal_those_of_a_test_set_with_that_prior(case, data):
    probabilities, labels, classes = case
    # Replicate each class so that the test set follows the target prior exactly.
    share = np.array(data.draw(st.lists(st.integers(1, 3), min_size=classes, max_size=classes)))
    counts = np.bincount(labels, minlength=classes)
    common = math.lcm(*counts.tolist())
    copies = np.repeat(np.arange(len(labels)), (share * common // counts)[labels])
    if len(copies) > 200_000:
        return
    target = share / share.sum()
    groups = ["many"] * classes
    metrics = prediction_metrics(probabilities, labels, groups, target, bins=15, top_k=2)["at_target_prior"]
    drawn = prediction_metrics(probabilities[copies], labels[copies], groups, target, bins=15, top_k=2)
    for name in ("all", "nll", "ece"):
        assert metrics[name] == pytest.approx(drawn[name], abs=1e-9), name


def test_groups_are_means_of_class_accuracies_and_an_empty_one_is_none():
    labels = np.array([0, 0, 0, 0, 1, 2])
    predicted = np.array([0, 0, 0, 1, 1, 0])
    probabilities = np.eye(4)[predicted]
    metrics = prediction_metrics(
        probabilities, labels, ["many", "many", "few", "few"], np.full(4, 0.25), bins=15, top_k=1
    )
    assert metrics["many"] == pytest.approx((3 / 4 + 1) / 2) and metrics["few"] == 0.0 and metrics["medium"] is None
    assert metrics["all"] == pytest.approx(4 / 6) and metrics["top1"] == pytest.approx(4 / 6)
    # Class 3 has no test sample, so it is excluded.
    assert metrics["balanced_accuracy"] == pytest.approx((3 / 4 + 1 + 0) / 3)
    assert mean_of([]) is None and mean_of([None]) is None


def test_a_confident_error_does_not_make_the_likelihood_infinite():
    assert negative_log_likelihood(np.array([[1.0, 0.0]]), np.array([1])) == pytest.approx(-math.log(1e-12))


def test_adjustment_for_the_training_prior_favours_head_classes():
    logits, log_prior = np.array([[0.0, 0.1]]), np.log([0.9, 0.1])
    assert (
        adjusted_probabilities(logits, log_prior, 0.0).argmax() == 1
        and adjusted_probabilities(logits, log_prior, 1.0).argmax() == 0
    )
    odds = adjusted_probabilities(logits, log_prior, 1.0)[0]
    assert odds[0] / odds[1] == pytest.approx(9 * math.exp(-0.1))
