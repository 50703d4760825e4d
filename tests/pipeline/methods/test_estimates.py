"""Intervals over seeds and test images: their coverage, and known cases."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from pipeline.evaluation.intervals import weighted_accuracy
from pipeline.methods.estimates import accuracy_estimate, class_weights, estimate

GROUPS = ["many"] * 2 + ["medium"] * 3 + ["few"] * 5
SIZES = np.array([40, 40, 30, 30, 30, 20, 20, 20, 20, 20])
LABELS = np.repeat(np.arange(10), SIZES)


def test_the_weights_of_a_measure_are_equal_over_its_classes_with_test_images() -> None:
    tested = np.array([4, 0, 1, 1, 1, 0, 0, 0, 0, 0])
    weights = class_weights(GROUPS, tested)
    assert weights["all"].tolist() == [0.25, 0, 0.25, 0.25, 0.25, 0, 0, 0, 0, 0]
    assert weights["many"].tolist() == [1, *[0] * 9]
    assert estimate(np.ones((1, 7)), np.repeat(np.arange(10), tested), weights["few"]).value is None


@pytest.mark.parametrize(("seeds", "spread"), [(3, 0.0), (3, 0.06), (5, 0.03)])
def test_the_interval_holds_the_true_difference_of_two_methods_nineteen_times_in_twenty(seeds, spread) -> None:
    generator = np.random.default_rng(0)
    weights = class_weights(GROUPS, SIZES)["all"]
    p, hits, draws = np.linspace(0.9, 0.3, 10), 0, 400
    true = 0.05  # of each class, on average over seeds
    for _ in range(draws):
        base = generator.random(len(LABELS))  # how hard an image is, the same for both methods and all seeds
        shift = generator.normal(0, spread, (2, seeds, 1))
        noise = generator.normal(0, 0.05, (2, seeds, len(LABELS)))
        right = base + noise < p[LABELS] + shift + np.array([0.0, true])[:, None, None]
        difference = right[1].astype(float) - right[0]
        interval = estimate(difference, LABELS, weights)
        hits += interval.low <= true <= interval.high
    assert 0.92 <= hits / draws <= 1.0


def test_one_seed_has_about_the_interval_of_the_stratified_bootstrap() -> None:
    generator = np.random.default_rng(1)
    right = (generator.random(len(LABELS)) < 0.6).astype(float)
    own = estimate(right[None], LABELS, class_weights(GROUPS, SIZES)["all"])
    correct = np.bincount(LABELS, right, 10).astype(int)
    other = weighted_accuracy(correct, SIZES, np.ones(10))
    assert own.value == pytest.approx(other.value)
    assert (own.low, own.high) == pytest.approx((other.low, other.high), abs=0.005)


def test_equal_predictions_have_a_difference_of_exactly_zero_and_accuracies_stay_in_their_range() -> None:
    weights = class_weights(GROUPS, SIZES)["all"]
    zero = estimate(np.zeros((3, len(LABELS))), LABELS, weights)
    assert (zero.value, zero.low, zero.high) == (0, 0, 0)
    high = np.ones((2, len(LABELS)))
    high[0, :9] = 0
    assert accuracy_estimate(high, LABELS, weights).high == 1


def test_an_accuracy_of_0_or_1_has_the_interval_of_clopper_and_pearson() -> None:
    labels, weights = np.repeat(np.arange(8), 10), np.full(8, 1 / 8)
    bound = scipy.stats.beta.ppf(0.975, 1, 80)  # no success in 80 trials
    none, all_ = (accuracy_estimate(np.full((3, 80), value), labels, weights) for value in (0.0, 1.0))
    assert (none.value, none.low, none.high) == pytest.approx((0, 0, bound))
    assert (all_.value, all_.low, all_.high) == pytest.approx((1, 1 - bound, 1))
