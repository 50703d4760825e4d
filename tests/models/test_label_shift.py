"""Label shift: the estimated prior against QuaPy's EM and a general optimiser, on five standard shifted test sets."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize, minimize_scalar

from models.calibration import calibrate, fit_calibration, fit_temperature
from models.label_shift import (
    bootstrap_priors,
    estimate_prior,
    interval,
    mapls_concentration,
    total_variation,
)
from models.prior import softmax

CLASSES = 10
RATIOS = {"forward 50": 50, "forward 10": 10, "uniform": 1, "backward 10": 1 / 10, "backward 50": 1 / 50}
MEANS = np.random.default_rng(7).normal(size=(CLASSES, 8))


def shifted(ratio):
    """Return a prior that falls from the first class to the last by the factor `ratio`."""
    p = ratio ** -np.linspace(0, 1, CLASSES)
    return p / p.sum()


def drawn(prior, samples, seed=0):
    """Draw labels, and the exact log-likelihoods of Gaussian classes, which are logits for the balanced prior."""
    random = np.random.default_rng(seed)
    labels = random.choice(CLASSES, samples, p=prior)
    points = MEANS[labels] + random.normal(size=(samples, 8))
    return labels, points @ MEANS.T - (MEANS**2).sum(1) / 2


@pytest.mark.slow
@pytest.mark.parametrize("ratio", RATIOS.values(), ids=RATIOS)
def test_em_finds_the_prior_of_each_shifted_set_where_quapys_em_finds_it(ratio, monkeypatch):
    from quapy.method.aggregative import EMQ

    monkeypatch.setattr(EMQ, "MAX_ITER", 100_000)  # plain EM needs more than its default of 1,000 steps for 1e-5
    _, logits = drawn(shifted(ratio), 3000)
    probabilities = softmax(logits)
    actual = estimate_prior(probabilities, tolerance=1e-8)
    assert actual.converged and actual.prior.sum() == pytest.approx(1, abs=1e-12)
    theirs, _ = EMQ.EM(np.full(CLASSES, 1 / CLASSES), probabilities, epsilon=1e-9)
    assert np.abs(actual.prior - theirs).max() < 1e-5
    assert total_variation(actual.prior, shifted(ratio)) < 0.05


@pytest.mark.parametrize("concentration", [1.0, 4.0])
def test_no_general_optimiser_finds_a_likelier_prior_and_the_gap_is_a_bound(concentration):
    _, logits = drawn(shifted(50), 400)
    p = softmax(logits)

    def loss(free):
        prior = softmax(free)
        return -np.log(p @ prior).sum() - (concentration - 1) * np.log(prior).sum()

    best = minimize(loss, np.zeros(CLASSES), method="BFGS", options={"gtol": 1e-7})
    actual = estimate_prior(p, concentration=concentration, tolerance=1e-7)
    assert loss(np.log(actual.prior)) <= best.fun + 1e-6
    rough = estimate_prior(p, concentration=concentration, max_iterations=4)
    assert not rough.converged and loss(np.log(rough.prior)) - best.fun <= rough.gap + 1e-6


@given(st.integers(0, 10**6), st.floats(1, 30))
def test_the_source_prior_is_removed_from_the_probabilities(seed, ratio):
    _, logits = drawn(shifted(5), 200, seed)
    source = shifted(ratio)
    balanced = estimate_prior(softmax(logits), tolerance=1e-7).prior
    adjusted = estimate_prior(softmax(logits + np.log(source)), source, tolerance=1e-7).prior
    assert np.allclose(balanced, adjusted, atol=1e-3)


def test_the_fixed_point_of_mapls_is_a_fixed_point_of_map():
    _, logits = drawn(shifted(50), 500)
    p, kept = softmax(logits), 0.7
    actual = estimate_prior(p, concentration=mapls_concentration(kept, 500, CLASSES), tolerance=1e-9).prior
    posterior = p * actual / (p @ actual)[:, None]
    assert np.allclose(actual, kept * posterior.mean(0) + (1 - kept) / CLASSES, atol=1e-6)


def test_one_sample_and_certain_predictions_give_no_nan():
    sure = np.eye(3)[[0, 0, 1]]
    assert np.allclose(estimate_prior(sure).prior, [2 / 3, 1 / 3, 0], atol=1e-3)
    assert np.isfinite(estimate_prior(sure[:1]).prior).all()
    assert estimate_prior(sure, concentration=2.0).prior.tolist() == pytest.approx([3 / 6, 2 / 6, 1 / 6], abs=1e-3)


def test_intervals_cover_the_true_prior_about_as_often_as_they_say():
    truth, covered = shifted(10), []
    for seed in range(40):
        p = softmax(drawn(truth, 500, seed)[1])
        low, high = interval(bootstrap_priors(p, estimate_prior(p), resamples=100, seed=seed), 0.9)
        covered.append((low <= truth) & (truth <= high))
    # 400 intervals, correlated within a set of ten: the tolerance is four standard errors around 90 %.
    assert abs(np.mean(covered) - 0.9) < 0.07


def test_the_bootstrap_is_the_same_for_the_same_seed():
    p = softmax(drawn(shifted(10), 200)[1])
    estimate = estimate_prior(p)
    one, same, other = (bootstrap_priors(p, estimate, resamples=20, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    assert np.allclose(one.sum(1), 1)


def test_calibration_takes_back_a_temperature_and_biases_and_the_estimate_with_it():
    bias = np.linspace(0, 2, CLASSES)
    labels, logits = drawn(shifted(3), 4000, 1)  # the validation set's long tail must have no effect
    fitted = fit_calibration(3 * logits + bias, labels)
    assert fitted.temperature == pytest.approx(3, rel=0.1)
    expected = -(bias - bias.mean()) / 3
    assert np.abs(fitted.bias - expected).max() < 0.25
    _, live = drawn(shifted(50), 3000, 2)
    plain = estimate_prior(softmax(3 * live + bias)).prior
    better = estimate_prior(softmax(calibrate(3 * live + bias, fitted))).prior
    assert total_variation(better, shifted(50)) < 0.05 < total_variation(plain, shifted(50))


@pytest.mark.parametrize("scale", [0.01, 0.3, 1.0, 3.0, 500.0])
def test_the_temperature_alone_is_scipys_minimum_whatever_the_scale(scale):
    labels, logits = drawn(shifted(3), 1000, 1)
    weights = 1 / np.bincount(labels)[labels]

    def loss(log_temperature):
        p = softmax(scale * logits / np.exp(log_temperature))
        return np.average(-np.log(p[np.arange(len(labels)), labels]), weights=weights)

    expected = minimize_scalar(loss, bounds=(np.log(scale) - 3, np.log(scale) + 3), method="bounded").x
    assert fit_temperature(scale * logits, labels) == pytest.approx(np.exp(expected), rel=1e-3)


def test_calibration_of_separable_data_stays_finite():
    assert 0 < fit_temperature(np.array([[5.0, 0.0, 0.0], [0.0, 5.0, 0.0]]), np.array([0, 1])) < 5
    fitted = fit_calibration(np.array([[5.0, 0.0, 0.0], [0.0, 5.0, 0.0]]), np.array([0, 1]))
    assert np.isfinite(fitted.bias).all() and 0 < fitted.temperature < np.inf


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: estimate_prior([0.5, 0.5]), "probabilities has shape [2]; expected [N, C]"),
        (lambda: estimate_prior(np.zeros((0, 3))), "probabilities has shape [0, 3]"),
        (lambda: estimate_prior([[0.5, 0.4]]), "probabilities has a row that is none"),
        (lambda: estimate_prior([[np.nan, 1]]), "probabilities has a row that is none"),
        (lambda: estimate_prior([[0.5, 0.5]], [1, 0]), "source_prior has a class without mass"),
        (lambda: estimate_prior([[0.5, 0.5]], concentration=0.5), "concentration is 0.5; expected finite numbers >= 1"),
        (lambda: estimate_prior([[0.5, 0.5]], tolerance=0), "tolerance is 0"),
        (lambda: mapls_concentration(0, 1, 2), "em_share is 0; expected a share above 0"),
        (lambda: interval(np.zeros((3, 2)), 1.0), "confidence is 1.0"),
        (lambda: fit_calibration([[1.0, 2.0]], [2]), "labels has 2 to 2; expected 0 to 1"),
        (lambda: fit_calibration([[1.0, np.inf]], [0]), "logits has an entry that is not finite"),
        (lambda: fit_calibration([[2.0, 0.0], [0.0, 2.0]], [1, 0]), "logits do not grow with the labels"),
        (lambda: fit_temperature([[2.0, 0.0], [0.0, 2.0]], [1, 0]), "logits do not grow with the labels"),
        (lambda: fit_temperature([[1.0, 2.0]], [0, 1]), "labels [2]; expected [N, C] and [N]"),
    ],
)
def test_invalid_arguments_of_the_estimate_are_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
