"""Class prior, logit adjustment and target priors given by the caller."""

import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.prior import (
    adjust_logits,
    check_target_prior,
    class_prior,
    effective_number,
    log_class_prior,
    log_target_prior,
    shot_group,
    softmax,
)

COUNTS = st.lists(st.integers(1, 10**6), min_size=1, max_size=50)


@given(COUNTS)
def test_the_prior_is_each_classs_share_of_the_samples(counts):
    p = class_prior(counts)
    assert p.dtype == np.float64
    assert p.tolist() == pytest.approx([count / sum(counts) for count in counts], rel=1e-14)
    assert math.fsum(p) == pytest.approx(1, abs=1e-12)
    assert log_class_prior(counts).tolist() == pytest.approx([math.log(c / sum(counts)) for c in counts], rel=1e-12)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=20), st.floats(1e-6, 1e6))
def test_smoothing_is_that_many_samples_more_in_every_class(counts, smoothing):
    total = math.fsum(count + smoothing for count in counts)
    expected = [(count + smoothing) / total for count in counts]
    assert class_prior(counts, smoothing).tolist() == pytest.approx(expected, rel=1e-12)
    assert np.isfinite(log_class_prior(counts, smoothing)).all()


@pytest.mark.parametrize(
    ("counts", "smoothing", "message"),
    [
        ([3, 0, 0], 0, "class 1 has no training samples (such classes: 2)"),
        ([3, -2], 0, "counts has -2.0; expected finite numbers >= 0"),
        ([3, math.nan], 0, "counts has nan; expected finite numbers >= 0"),
        ([math.inf, 3], 1, "counts has inf; expected finite numbers >= 0"),
        ([], 0, "counts has shape (0,); expected one count per class"),
        ([[1, 2]], 0, "counts has shape (1, 2); expected one count per class"),
        ([1, 2], -1, "smoothing is -1; expected a finite number >= 0"),
        ([1, 2], math.nan, "smoothing is nan; expected a finite number >= 0"),
        ([1, 2], math.inf, "smoothing is inf; expected a finite number >= 0"),
    ],
)
def test_invalid_counts_are_named(counts, smoothing, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        class_prior(counts, smoothing)


@given(
    st.lists(st.lists(st.floats(-50, 50), min_size=3, max_size=3), min_size=1, max_size=5),
    st.lists(st.floats(-20, 0), min_size=3, max_size=3),
    st.floats(-3, 3),
)
def test_numpy_and_torch_adjust_alike_by_strength_times_log_prior(logits, log_prior, strength):
    expected = [[value + strength * eta for value, eta in zip(row, log_prior, strict=True)] for row in logits]
    with_numpy = adjust_logits(np.array(logits), np.array(log_prior), strength)
    with_torch = adjust_logits(torch.from_numpy(np.array(logits)), torch.from_numpy(np.array(log_prior)), strength)
    assert np.array_equal(with_numpy, expected)
    assert np.array_equal(with_torch.numpy(), expected)
    assert np.array_equal(adjust_logits(np.array(logits), np.array(log_prior), 0.0), np.array(logits))


def test_each_row_may_have_its_own_strength():
    logits, log_prior = np.zeros((3, 2), dtype=np.float32), np.array([-1, -2], dtype=np.float32)
    strength = np.array([[0], [1], [2.5]], dtype=np.float32)
    adjusted = adjust_logits(logits, log_prior, strength)
    assert adjusted.tolist() == [[0, 0], [-1, -2], [-2.5, -5]]
    tensors = (torch.from_numpy(array) for array in (logits, log_prior, strength))
    assert adjust_logits(*tensors).tolist() == adjusted.tolist()


@given(
    st.lists(st.integers(1, 500), min_size=2, max_size=6),
    st.lists(st.floats(0.01, 1), min_size=6, max_size=6),
)
def test_adjusting_balanced_answers_by_the_log_prior_is_bayes_rule(counts, likelihoods):
    likelihoods = likelihoods[: len(counts)]
    posterior = [count * likelihood for count, likelihood in zip(counts, likelihoods, strict=True)]
    adjusted = softmax(adjust_logits(np.log([likelihoods]), log_class_prior(counts), 1.0))[0]
    assert adjusted.tolist() == pytest.approx([value / math.fsum(posterior) for value in posterior], rel=1e-10)


@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=8))
def test_softmax_is_positive_sums_to_one_and_does_not_overflow(logits):
    actual = softmax(np.array(logits, dtype=np.float32))
    peak = max(np.array(logits, dtype=np.float32).tolist())
    mass = [math.exp(value - peak) for value in np.array(logits, dtype=np.float32).tolist()]
    assert actual.dtype == np.float64
    assert actual.tolist() == pytest.approx([m / math.fsum(mass) for m in mass], rel=1e-12, abs=1e-300)


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=10), st.floats(-9e-4, 9e-4))
def test_a_target_prior_within_a_thousandth_of_one_is_made_exact(weights, off):
    exact = np.array(weights) / sum(weights)
    actual = check_target_prior(exact * (1 + off), len(weights))
    assert actual.sum() == pytest.approx(1, abs=1e-12)
    assert np.allclose(actual, exact, rtol=1e-12)


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        ([0.5, 0.5], "target_prior has shape [2]; expected 3 numbers, one per class"),
        (1.0, "target_prior has shape []; expected 3 numbers"),
        ([0.5, 0.7, -0.2], "negative entry (-0.2)"),
        ([0.5, 0.5, math.nan], "not finite"),
        ([0.5, math.inf, 0.5], "not finite"),
        ([0.5, 0.2, 0.2], "target_prior sums to 0.9; expected a sum of 1"),
        ([[0.5, 0.5, 0], [2, 0, 0]], "target_prior sums to 2; expected a sum of 1"),
        ([0, 0, 0], "target_prior sums to 0; expected a sum of 1"),
        ([1e308, 1e308, 1e308], "target_prior sums to inf"),
        (["a", "b", "c"], "could not convert string to float"),
    ],
)
def test_an_invalid_target_prior_raises_an_error_with_its_fault(prior, message):
    with np.errstate(over="ignore"), pytest.raises(ValueError, match=re.escape(message)):
        check_target_prior(prior, 3)


def test_a_class_without_mass_in_the_target_prior_ranks_last_and_stays_finite():
    log_prior = log_target_prior([0.0, 0.25, 0.75])
    assert np.isfinite(log_prior).all() and np.isfinite(log_prior.astype(np.float32)).all()
    answered = softmax(np.array([30.0, -30.0, -30.0]) + log_prior)
    assert answered.argsort().tolist()[::-1] == [2, 1, 0] and answered[0] < 1e-10


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("tau_s", [1 / 30, 0.01, 1e-4])
def test_a_prior_of_0_rules_a_class_out_for_every_tau_s(tau_s, dtype):
    log_prior = log_target_prior([0.0, 0.4, 0.6]).astype(dtype)
    cosines = np.array([[1.0, -1.0, -1.0]])  # an image with the highest similarity to the excluded class
    adjusted = adjust_logits((cosines / tau_s).astype(dtype), log_prior, 1.0)
    assert np.isfinite(adjusted).all()
    assert softmax(adjusted)[0].tolist() == pytest.approx([0, 0.4, 0.6], rel=1e-3 if dtype == np.float32 else 1e-9)


def test_a_prior_below_the_range_of_float32_is_used_unchanged():
    assert log_target_prior([1e-300, 1 - 1e-300])[0] == pytest.approx(-300 * math.log(10))


@pytest.mark.parametrize(
    ("count", "group"),
    [(0, "few"), (19, "few"), (20, "medium"), (100, "medium"), (101, "many"), (5000, "many")],
)
def test_classes_are_many_above_100_few_below_20_and_medium_between(count, group):
    assert shot_group(count) == group


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=6), st.sampled_from([0.5, 0.9, 0.999, 0.9999, 1 - 2**-30]))
def test_the_effective_number_is_the_geometric_sum_that_cui_et_al_write(counts, beta):
    exact = [sum((Fraction(beta) ** k for k in range(n)), Fraction()) if n < 40 else None for n in counts]
    actual = effective_number(counts, beta)
    for value, sum_of_powers, n in zip(actual, exact, counts, strict=True):
        assert value == pytest.approx(float(sum_of_powers), rel=1e-12) if sum_of_powers is not None else 1 <= value < n
        assert value <= min(n, 1 / (1 - beta)) * (1 + 1e-12)


def test_the_effective_number_lies_between_one_a_class_and_the_counts_themselves():
    counts = [5000, 50, 1]
    assert effective_number(counts, 1e-9) == pytest.approx([1, 1, 1])
    assert effective_number(counts, 1 - 1e-12) == pytest.approx(counts, rel=1e-6)
    assert effective_number([0, 1], 0.9).tolist() == [0, 1]
    for beta in (0, 1, -0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="expected a number above 0 and below 1"):
            effective_number(counts, beta)
