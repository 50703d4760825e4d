"""Confidence intervals: coverage, agreement with an independent reference, and results for empty groups."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from pipeline.evaluation.intervals import NO_ESTIMATE, bootstrap, weighted_accuracy, wilson


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_interval_equals_scipys(pair):
    right, total = pair
    expected = binomtest(right, total).proportion_ci(0.95, method="wilson")
    estimate = wilson(right, total)
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert estimate.low <= estimate.value <= estimate.high


def test_without_samples_there_is_no_estimate():
    assert wilson(0, 0) == NO_ESTIMATE
    assert weighted_accuracy(np.array([0, 0]), np.array([0, 0]), np.ones(2)) == NO_ESTIMATE
    assert weighted_accuracy(np.array([3, 0]), np.array([4, 0]), np.array([0.0, 1.0])) == NO_ESTIMATE


def test_the_bootstrap_of_one_class_equals_scipys():
    right = np.repeat([1.0, 0.0], [60, 40])
    expected = scipy.stats.bootstrap(
        (right,), np.mean, method="percentile", n_resamples=4000, rng=np.random.default_rng(0)
    )
    estimate = weighted_accuracy(np.array([60]), np.array([100]), np.ones(1))
    assert estimate.value == pytest.approx(0.6)
    assert (estimate.low, estimate.high) == pytest.approx(tuple(expected.confidence_interval), abs=0.011)


def test_the_interval_of_a_mean_over_classes_covers_the_truth_within_binomial_noise():
    accuracy, tested = np.array([0.95, 0.8, 0.5, 0.3]), np.array([60, 30, 20, 10])
    random, covered = np.random.default_rng(0), 0
    for seed in range(200):
        estimate = weighted_accuracy(random.binomial(tested, accuracy), tested, np.ones(4), seed=seed)
        covered += estimate.low <= accuracy.mean() <= estimate.high
    assert 176 <= covered <= 200  # 95 of 100, three standard errors and the bootstrap's own shortfall below


@pytest.mark.slow
@pytest.mark.parametrize("images", [1, 2, 5])
def test_classes_with_few_images_do_not_narrow_the_interval(images):
    random, covered = np.random.default_rng(images), 0
    tested = np.full(40, images)
    for seed in range(200):
        accuracy = random.beta(2, 1.5, 40)
        estimate = weighted_accuracy(random.binomial(tested, accuracy), tested, np.ones(40), seed=seed)
        covered += estimate.low <= accuracy.mean() <= estimate.high
    assert covered >= 176  # 95 of 100, three standard errors and the bootstrap's own shortfall below


def test_weights_need_not_sum_to_one_and_classes_without_samples_are_excluded():
    right, tested = np.array([5, 9, 0]), np.array([10, 10, 0])
    assert weighted_accuracy(right, tested, np.array([3.0, 1.0, 7.0])).value == pytest.approx(0.6)


def test_all_predictions_correct_gives_wilsons_interval():
    estimate = weighted_accuracy(np.array([20, 20]), np.array([20, 20]), np.ones(2))
    assert estimate.high == 1.0 and estimate.low == pytest.approx(wilson(40, 40).low)


def test_the_bootstrap_is_deterministic_and_widens_with_fewer_samples():
    def spread(samples):
        values = np.arange(samples) % 2
        interval = bootstrap(lambda rows: values[rows].mean(axis=-1), samples)
        assert interval == bootstrap(lambda rows: values[rows].mean(axis=-1), samples)
        return interval[1] - interval[0]

    assert spread(2000) < spread(200) < spread(20)


def test_the_bootstrap_of_rows_equals_scipys_with_the_same_draws():
    values = np.random.default_rng(1).normal(size=300)
    expected = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=2000, confidence_level=0.9, method="percentile", rng=np.random.default_rng(7)
    ).confidence_interval
    interval = bootstrap(lambda rows: values[rows].mean(axis=-1), len(values), 2000, 0.9, 7)
    assert interval == pytest.approx((expected.low, expected.high), rel=1e-12)
