"""Decisions from probabilities: costs against brute force, prediction sets against their definition and their guarantee."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

from models.decisions import (
    ASK,
    SetThresholds,
    Typicality,
    cheapest,
    check_costs,
    familiarity,
    images_needed,
    largest_coverage,
    prediction_set,
)
from models.prior import softmax

CLASSES = 6
MEANS = np.random.default_rng(3).normal(size=(CLASSES, 3))
VALIDATION = [40, 25, 12, 9, 4, 1]
PRIORS = {
    "balanced": np.full(CLASSES, 1 / CLASSES),
    "head": np.array([0.7, 0.2, 0.05, 0.03, 0.015, 0.005]),
    "tail": np.array([0.005, 0.015, 0.03, 0.05, 0.3, 0.6]),
    "without two": np.array([0, 0.5, 0.2, 0.2, 0.1, 0]),
}


def points(labels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Draw a point of each label's class; return the balanced log-likelihoods, [N,C], of a wrong temperature."""
    drawn = MEANS[labels] + random.normal(size=(len(labels), 3))
    return -0.8 * ((drawn[:, None] - MEANS) ** 2).sum(-1)


@settings(max_examples=50)
@given(st.integers(0, 10**6), st.sampled_from(["none", "class", "matrix"]), st.sampled_from([None, 0.0, 0.3, 5.0]))
def test_the_decision_has_the_least_expected_cost_of_all(seed, kind, ask):
    random = np.random.default_rng(seed)
    p = random.dirichlet(np.ones(4), size=5)
    costs = {"none": None, "class": random.uniform(0, 9, 4), "matrix": random.uniform(0, 9, (4, 4))}[kind]
    index, cost = cheapest(p, costs, ask)
    for row in range(5):
        expected = []
        for answer in range(4):
            paid = [
                costs[true, answer]
                if kind == "matrix"
                else 0
                if true == answer
                else 1
                if kind == "none"
                else costs[true]
                for true in range(4)
            ]
            expected.append(sum(p[row] * paid))
        least = min(expected)
        if ask is not None and ask < least:
            assert index[row] == ASK and cost[row] == ask
        else:
            assert expected[index[row]] == pytest.approx(least) and cost[row] == pytest.approx(least)


def test_equal_costs_are_the_most_probable_class():
    p = np.random.default_rng(0).dirichlet(np.ones(5), size=50)
    for costs in (None, np.full(5, 3.0), 3 - 3 * np.eye(5)):
        assert cheapest(p, costs, None)[0].tolist() == p.argmax(1).tolist()


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        (np.ones(4), r"shape \[4\]; expected 3 numbers, one per class, or 3 rows of 3"),
        (np.ones((3, 4)), r"shape \[3, 4\]"),
        (1.0, r"shape \[\]"),
        ([1, -2, 3], "costs has -2; expected finite numbers >= 0"),
        ([[0, 1, np.nan], [1, 0, 1], [1, 1, 0]], "costs has nan"),
        ([1, np.inf, 0], "costs has inf"),
        ([1, 1e39, 0], r"costs has 1e\+39; expected finite numbers >= 0, at most 3.403e\+38"),
    ],
)
def test_invalid_costs_are_named(costs, message):
    with pytest.raises(ValueError, match=message):
        check_costs(costs, 3)


def test_the_number_of_images_that_a_coverage_needs_is_exact():
    for coverage, images in ((0.5, 1), (0.9, 9), (0.95, 19), (0.99, 99), (0.999, 999)):
        assert images_needed(coverage) == images
        assert largest_coverage(images - 1) < coverage <= largest_coverage(images) + 1e-12


@pytest.mark.parametrize("coverage", [5e-324, 1e-40, 1e-16, 1e-12, 1e-7])
def test_the_smallest_coverages_have_finite_thresholds(coverage):
    thresholds = SetThresholds([[0.2, 0.7], [0.5], []], 0.5).thresholds(coverage, np.array([0.5, 0.3, 0.2]))
    assert thresholds[0] == 0.7 and np.isfinite(thresholds).all() and (thresholds <= 0.7).all()


def quantile(scores: list[float], weights: list[float], new: float, coverage: float) -> float:
    """The weighted split-conformal threshold by its definition: the new image has weight `new` and the least score."""
    for threshold in sorted(scores, reverse=True):
        above = sum(w for s, w in zip(scores, weights, strict=True) if s >= threshold)
        if above >= coverage * (sum(weights) + new) - 1e-12:
            return threshold
    return 0.0


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from(sorted(PRIORS)), st.sampled_from([0.5, 0.8, 0.9, 0.97]))
def test_thresholds_are_the_quantiles_of_their_definition(seed, name, coverage):
    random, prior = np.random.default_rng(seed), PRIORS[name]
    scores = [random.uniform(size=n).round(2).tolist() for n in VALIDATION]
    source = SetThresholds(scores, 0.5)
    own, shared = (source.thresholds(coverage, prior, weight) for weight in (1.0, 0.0))
    pooled = [s for values in scores for s in values]
    weights = [prior[c] / n for c, n in enumerate(VALIDATION) for _ in range(n)]
    for c, n in enumerate(VALIDATION):
        if prior[c] == 0:
            assert own[c] == shared[c] == np.inf
            continue
        assert own[c] == quantile(scores[c], [1.0] * n, 1.0, coverage)
        assert shared[c] == quantile(pooled, weights, prior[c] / n, coverage)
    finite, needed = prior > 0, images_needed(coverage)
    weight = np.array([max(0.5, n / (n + needed)) for n in VALIDATION])
    mixed = weight[finite] * own[finite] + (1 - weight[finite]) * shared[finite]
    assert source.thresholds(coverage, prior)[finite] == pytest.approx(mixed)


@pytest.mark.parametrize("name", sorted(PRIORS))
def test_one_set_of_validation_scores_covers_every_prior_that_a_request_names(name):
    """Over 300 validation splits of the same class sizes: mean coverage of test data that follows the prior."""
    random, prior, covered = np.random.default_rng(1), PRIORS[name], {0.0: [], None: [], 1.0: []}
    held = np.repeat(np.arange(CLASSES), VALIDATION)
    for _ in range(300):
        p = softmax(points(held, random))[np.arange(len(held)), held]
        scores = [p[held == c].tolist() for c in range(CLASSES)]
        labels = random.choice(CLASSES, 200, p=prior)
        logits = points(labels, random)
        adjusted = softmax(logits + np.log(np.maximum(prior, 1e-300)))
        for weight, means in covered.items():
            thresholds = SetThresholds(scores, 0.5).thresholds(0.8, prior, weight)
            sets = prediction_set(softmax(logits), adjusted, thresholds)
            means.append(np.mean([label in row for label, row in zip(labels, sets, strict=True)]))
    for weight, means in covered.items():
        error = np.std(means) / np.sqrt(len(means))
        assert np.mean(means) > 0.8 - 3 * error, weight  # the guarantee of 0 and 1; measured for the weights by images


def test_a_set_is_never_empty_and_ordered_by_probability():
    p = np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    sets = prediction_set(p, p[:, ::-1], np.array([0.6, 0.15, 0.15]))
    assert [row.tolist() for row in sets] == [[2, 1], [0, 1, 2]]


def test_a_prior_on_classes_without_validation_images_has_every_such_class_in_the_set():
    thresholds = SetThresholds([[0.9] * 20, []], 0.9).thresholds(0.9, np.array([0.0, 1.0]))
    assert thresholds.tolist() == [np.inf, 0]


def test_familiarity_is_the_log_density_under_the_training_prior():
    random = np.random.default_rng(0)
    logits, log_prior = 40 * random.normal(size=(30, CLASSES)), np.log(PRIORS["head"])
    assert familiarity(logits, log_prior) == pytest.approx(logsumexp(logits, axis=1, b=PRIORS["head"]), rel=1e-12)


def test_known_images_are_called_unknown_at_the_wanted_rate_and_other_ones_more_often():
    random, rates, found = np.random.default_rng(5), [], []
    groups = ["many", "many", "many", "few", "few", "few"]
    log_prior = np.log(PRIORS["head"])
    for _ in range(200):
        held, fresh = (points(np.tile(np.arange(CLASSES), 20), random) for _ in range(2))
        density, predicted = familiarity(held, log_prior), np.array(groups)[held.argmax(1)]
        typicality = Typicality({group: density[predicted == group].tolist() for group in set(groups)}, groups)
        rates.append(np.mean(typicality(familiarity(fresh, log_prior), fresh.argmax(1)) <= 0.1))
        far = -0.8 * ((4 + random.normal(size=(50, 1, 3)) - MEANS) ** 2).sum(-1)
        found.append(np.mean(typicality(familiarity(far, log_prior), far.argmax(1)) <= 0.1))
    assert 0.08 < np.mean(rates) < 0.1 + 3 * np.std(rates) / np.sqrt(len(rates))
    assert np.mean(found) > 0.9


def test_a_group_with_too_few_validation_images_has_no_alarm():
    typicality = Typicality({"many": [0.0] * 18, "few": [0.0] * 19}, ["many", "few"])
    share = typicality(np.array([-9.0, -9.0, 1.0]), np.array([0, 1, 1]))
    assert share == pytest.approx([1 / 19, 1 / 20, 1]) and images_needed(0.95) == 19
