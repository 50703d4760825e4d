"""The memory against a numpy reference and known distributions: rows, likelihoods, fit of tau and weight."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import logsumexp, softmax

from models.networks.memory import FeatureMemory, MemoryRows, build_memory, empty_rows, rows_per_class
from models.networks.memory_fit import (
    DEFAULT_TAU,
    LARGEST_SCALE,
    LEAST_WEIGHT,
    MINIMUM_IMAGES,
    TAUS,
    MemoryFit,
    fit_memory,
)
from models.prior import adjust_logits, log_class_prior


def directions(classes, width, seed=0):
    """Return a mean direction of length 1 for each class."""
    return F.normalize(torch.randn(classes, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def drawn(means, counts, spread, seed):
    """Draw features around the mean direction of their class; return features and labels."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    noise = torch.randn(len(labels), means.shape[1], generator=torch.Generator().manual_seed(seed))
    return means[labels] + spread * noise, labels


def reference(features, rows, labels, classes, tau):
    """Compute, for each class in float64, the log of the mean of exp(cos / tau) over the unit rows of the class."""
    features = features.astype(np.float64)
    cosines = features @ rows.astype(np.float64).T / np.linalg.norm(features, axis=1, keepdims=True)
    return np.stack(
        [logsumexp(cosines[:, labels == c] / tau, axis=1) - np.log((labels == c).sum()) for c in range(classes)], 1
    )


def accuracy(logits, labels):
    """Return the mean of per-class accuracies."""
    right = (logits.argmax(1) == labels).double()
    return float(torch.stack([right[labels == c].mean() for c in labels.unique()]).mean())


@pytest.mark.parametrize("tau", [TAUS[0], 0.07, TAUS[-1]])
def test_the_likelihood_of_a_class_is_the_mean_over_its_rows_also_of_a_class_with_one_row(tau):
    means = directions(4, 24)
    features, labels = drawn(means, [60, 17, 5, 1], 0.3, seed=1)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(2))
    stored = build_memory(features[order].half(), labels[order], 4)
    assert stored.rows.dtype == torch.float16 and torch.equal(stored.row_class, labels)
    images = torch.cat([features[order][labels[order] == label] for label in range(4)])
    assert torch.allclose(stored.rows.float(), F.normalize(images, dim=1), atol=1e-3)
    queries = torch.cat([drawn(means, [3, 3, 3, 3], 0.3, seed=3)[0], -means])
    actual = FeatureMemory(stored, 4, tau, 1.0)(queries)
    expected = reference(queries.numpy(), stored.rows.numpy(), labels.numpy(), 4, tau)
    assert np.allclose(actual.numpy(), expected, rtol=1e-5, atol=2e-4)
    assert torch.allclose(FeatureMemory(stored, 4, tau, 2.5)(queries), 2.5 * actual)


def test_a_class_without_images_has_a_finite_likelihood_and_is_never_predicted():
    features, labels = drawn(directions(3, 8), [5, 5, 0], 0.3, seed=1)
    logits = FeatureMemory(build_memory(features, labels, 3), 3, 0.05, 1.0)(features)
    assert logits.isfinite().all() and (logits.argmax(1) < 2).all()


def test_every_class_keeps_its_images_up_to_the_same_number_of_rows():
    assert rows_per_class([100, 30, 5, 1, 0], 1000) == [100, 30, 5, 1, 0]
    assert rows_per_class([100, 30, 5, 1, 0], 60) == [27, 27, 5, 1, 0]
    assert rows_per_class([100, 30, 5, 1, 0], 4) == [1, 1, 1, 1, 0]
    with pytest.raises(ValueError, match=r"^is 3; expected at least 4, one row for each class with images"):
        rows_per_class([100, 30, 5, 1, 0], 3)


def test_centres_stand_for_the_clusters_of_a_class_with_their_shares():
    clusters = directions(3, 16)
    first, members = drawn(clusters, [30, 20, 10], 0.1, seed=1)  # a cluster mean is clearly shorter than 1
    second, _ = drawn(directions(1, 16, seed=9), [2], 0.1, seed=2)
    stored = build_memory(torch.cat([first, second]), torch.cat([torch.zeros(60), torch.ones(2)]).long(), 2, limit=32)
    own = stored.row_class == 0
    assert len(stored.rows) <= 32 and int((stored.row_class == 1).sum()) == 2
    assert (stored.rows.float().norm(dim=1) <= 1.001).all()
    # The mean of the rows, weighted by their shares, is the mean of the images, also for the class with clusters.
    mean = F.normalize(first, dim=1).mean(0)
    assert torch.allclose(stored.log_share[own].exp() @ stored.rows[own].float(), mean, atol=1e-3)
    nearest = (stored.rows[own].float() @ clusters.T).argmax(1)
    shares = torch.zeros(3).index_add(0, nearest, stored.log_share[own].exp())
    assert torch.allclose(shares, torch.bincount(members) / 60)
    again = build_memory(torch.cat([first, second]), torch.cat([torch.zeros(60), torch.ones(2)]).long(), 2, limit=32)
    assert all(torch.equal(one, other) for one, other in zip(stored, again, strict=True))


def test_centres_predict_as_all_rows_do():
    means = directions(6, 32)
    counts = [200, 90, 40, 18, 8, 3]
    features, labels = drawn(means, counts, 0.35, seed=1)
    queries, target = drawn(means, [60] * 6, 0.35, seed=2)
    every, centres = (
        accuracy(FeatureMemory(build_memory(features, labels, 6, limit), 6, 0.1, 1.0)(queries), target)
        for limit in (None, 60)
    )
    assert every > 0.7 and centres > every - 0.03


def test_the_memory_is_balanced_and_the_target_prior_moves_it_to_the_frequencies_of_the_data():
    """Two von Mises distributions that overlap: Bayes' rule with the true densities is the reference."""
    kappa, angle = 4.0, 1.0
    draw = np.random.default_rng(0)
    means = np.array([0.0, angle])

    def sample(counts):
        labels = np.repeat([0, 1], counts)
        angles = draw.vonmises(means[labels], kappa)
        return torch.tensor(np.stack([np.cos(angles), np.sin(angles)], 1)).float(), torch.tensor(labels), angles

    features, labels, _ = sample([3000, 60])
    stored = build_memory(features, labels, 2)
    fit = fit_memory(stored, *sample([400, 400])[:2], torch.zeros(800, 2))
    memory = FeatureMemory(stored, 2, fit.tau, fit.weight)
    for counts, log_prior in (([2000, 2000], np.zeros(2)), ([4000, 80], log_class_prior([3000, 60]))):
        queries, target, angles = sample(counts)
        logits = adjust_logits(memory(queries), torch.tensor(log_prior), 1.0)
        bayes = torch.tensor(kappa * np.cos(angles[:, None] - means) + log_prior)
        right, best = ((each.argmax(1) == target).double().mean() for each in (logits, bayes))
        assert right > best - 0.02
        # Compare probabilities, not only the order of the classes.
        assert np.abs(softmax(logits.numpy(), axis=1) - softmax(bayes.numpy(), axis=1)).mean() < 0.06


@pytest.mark.parametrize("planted", [0.4, 1.5])
def test_the_fit_recovers_a_planted_tau_and_weight(planted):
    means = directions(5, 12)
    stored = build_memory(*drawn(means, [40, 20, 10, 5, 2], 0.4, seed=1), 5)
    queries, _ = drawn(means, [4000] * 5, 0.5, seed=2)
    student = 3 * F.normalize(queries, dim=1) @ directions(5, 12, seed=7).T
    logits = student + FeatureMemory(stored, 5, TAUS[4], planted)(queries)
    labels = torch.multinomial(logits.softmax(1), 1, generator=torch.Generator().manual_seed(3))[:, 0]
    # Labels drawn from softmax(logits) are those of a balanced sample once each class is reweighted by its frequency.
    frequency = torch.bincount(labels, minlength=5) / len(labels)
    fit = fit_memory(stored, queries, labels, student - frequency.log())
    assert fit.images == len(labels)
    assert fit.tau == TAUS[4] and fit.weight == pytest.approx(planted, rel=0.1)


def test_a_memory_that_does_not_help_gets_the_least_weight_and_no_mistake_gives_the_largest_scale():
    means = directions(3, 8)
    stored = build_memory(*drawn(means, [9, 9, 9], 0.1, seed=1), 3)
    queries, labels = drawn(means, [20] * 3, 0.1, seed=2)
    wrong = stored._replace(row_class=(2 - stored.row_class).flip(0), rows=stored.rows.roll(9, 0))
    perfect = 20 * F.one_hot(labels).float()
    assert fit_memory(wrong, queries, labels, perfect).weight == 0
    alone = fit_memory(wrong, queries, labels, torch.zeros(60, 3), LEAST_WEIGHT)
    assert alone.weight == LEAST_WEIGHT > 0 and alone.tau in TAUS
    certain = fit_memory(stored, queries, labels, torch.zeros(60, 3))
    assert LARGEST_SCALE * 0.999 < certain.weight / certain.tau <= LARGEST_SCALE == 100


@pytest.mark.parametrize("images", [0, 1, 2, 3, 4, 5, 29])
def test_too_few_images_give_the_defaults_whatever_they_show(images):
    means = directions(2, 8)
    stored = build_memory(*drawn(means, [9, 9], 0.1, seed=1), 2)
    queries, labels = drawn(means, [15, 15], 0.1, seed=2)
    few = torch.arange(30).reshape(2, 15).T.flatten()[:images]
    for shown in (labels[few], 1 - labels[few]):
        for least in (0.0, LEAST_WEIGHT):
            fit = fit_memory(stored, queries[few], shown, torch.zeros(images, 2), least)
            assert fit == MemoryFit(DEFAULT_TAU, 1.0, None, images)
    assert images < MINIMUM_IMAGES and fit_memory(stored, queries, labels, torch.zeros(30, 2)).loss is not None


def test_a_loaded_memory_answers_as_the_saved_one():
    stored = build_memory(*drawn(directions(3, 8), [9, 4, 1], 0.3, seed=1), 3)
    saved = FeatureMemory(stored, 3, 0.07, 1.2)
    loaded = FeatureMemory(empty_rows(14, 8), 3, 0.07, 1.2)
    loaded.load_state_dict(saved.state_dict())
    queries = torch.randn(4, 8)
    assert torch.equal(loaded(queries), saved(queries))
    assert isinstance(stored, MemoryRows) and loaded.rows.dtype == torch.float16
