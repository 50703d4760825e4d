"""Second stages against scikit-learn, PyTorch and numpy, and the settings at which each of them changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid

from models.class_sampler import ClassSampler
from models.losses.per_sample import smoothed_losses, smoothing_of_classes
from models.networks.cosine_classifier import LinearHead, gated_logits, linear_head
from models.second_stage import methods
from models.second_stage.disalign import class_weights, weighted_cross_entropy
from models.second_stage.fitting import (
    NORM,
    Fit,
    Head,
    NotFiniteError,
    Recipe,
    TrainingFeatures,
    length_of,
    scaled,
)
from models.second_stage.meta_sampler import MetaSampler
from models.second_stage.metasaug import MetaSAug, class_variances
from models.second_stage.nearest_mean import nearest_mean
from models.second_stage.tau_norm import TAUS, tau_normalised

CPU = torch.device("cpu")
COUNTS, WIDTH = [400, 60, 12], 6


def drawn(counts, seed, views=1, spread=0.9):
    """Features [N,V,D] around one direction per class that is the same for all seeds, and labels."""
    means = 2 * F.normalize(torch.randn(len(counts), WIDTH, generator=torch.Generator().manual_seed(3)), dim=1)
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    noise = torch.randn(len(labels), views, WIDTH, generator=torch.Generator().manual_seed(seed))
    return TrainingFeatures(means[labels][:, None] + spread * noise, labels, len(counts))


@pytest.fixture(name="start", scope="module")
def _start():
    """A linear classifier trained by plain cross-entropy, with which rare classes are predicted too rarely."""
    return methods.train_linear(drawn(COUNTS, 0), Fit(methods.RECIPES["linear"], 0, CPU))


def recalls(head, data):
    predicted = head(data.features[:, 0]).argmax(1)
    return np.array([float((predicted[data.labels == c] == c).float().mean()) for c in range(data.classes)])


def test_the_nearest_class_mean_is_scikit_learns_on_centred_features_of_length_1():
    data, test = drawn(COUNTS, 0, views=2), drawn([30, 30, 30], 1)
    centre, weight, bias = nearest_mean(*data)
    rows = data.features.flatten(0, 1).double().numpy()
    assert np.allclose(centre, rows.mean(0))

    def unit(values):
        moved = values - rows.mean(0)
        return moved / np.linalg.norm(moved, axis=1, keepdims=True)

    reference = NearestCentroid().fit(unit(rows), data.labels.repeat_interleave(2).numpy())
    queries = unit(test.features[:, 0].double().numpy())
    distances = ((queries[:, None] - reference.centroids_) ** 2).sum(2)
    assert np.allclose(queries @ weight.T.numpy() + bias.numpy(), -distances)
    head = linear_head(weight, bias, centre)
    assert head(test.features[:, 0]).argmax(1).tolist() == reference.predict(queries).tolist()


def test_tau_0_changes_no_weight_and_tau_1_gives_rows_of_length_1():
    weight = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    assert torch.equal(tau_normalised(weight, 0), weight)
    assert torch.allclose(tau_normalised(weight, 1).norm(dim=1), torch.ones(5))
    cosine = F.normalize(weight, dim=1)
    for tau in TAUS:  # of a cosine classifier, at every tau
        assert torch.allclose(tau_normalised(cosine, tau), cosine)
    assert TAUS[0] == 0 and TAUS[-1] == 2 and len(TAUS) == 21


def test_a_balanced_linear_classifier_is_the_one_of_scikit_learn_with_balanced_class_weights():
    data, test = drawn([400, 150, 80], 0), drawn([200, 200, 200], 1)
    recipe = Recipe(60, 512, 2.0, balanced=True)
    head = methods.train_linear(data, Fit(recipe, 0, CPU))
    unit = F.normalize(data.features[:, 0], dim=1).numpy()
    reference = LogisticRegression(C=1e4, class_weight="balanced").fit(NORM * unit, data.labels.numpy())
    queries = NORM * F.normalize(test.features[:, 0], dim=1).numpy()
    agreement = (head(test.features[:, 0]).argmax(1).numpy() == reference.predict(queries)).mean()
    assert agreement > 0.97


@pytest.mark.parametrize("kind", ["crt", "balanced_softmax", "lws", "mislas", "disalign", "balms", "metasaug"])
def test_each_method_predicts_the_rarest_class_more_often_than_plain_cross_entropy(kind, start):
    data, test = drawn(COUNTS, 0), drawn([200, 200, 200], 1)
    given = start, data, Fit(methods.RECIPES[kind], 0, CPU)
    log_prior = (torch.tensor(COUNTS).double() / sum(COUNTS)).log()
    head = {
        "crt": lambda: methods.train_linear(*given[1:]),
        "lws": lambda: methods.train_lws(*given),
        "mislas": lambda: methods.train_mislas(*given, (0.4, 0.1)),
        "disalign": lambda: methods.train_disalign(*given, log_prior),
        "balanced_softmax": lambda: methods.train_linear(*given[1:], log_prior),
        "balms": lambda: methods.train_balms(*given, log_prior),
        "metasaug": lambda: methods.train_metasaug(*given),
    }[kind]()
    before, after = recalls(start, test), recalls(head, test)
    assert after[2] > before[2] + 0.03 and after.mean() > before.mean()


def test_lws_only_scales_weight_and_bias_of_each_class(start):
    head = methods.train_lws(start, drawn(COUNTS, 0), Fit(methods.RECIPES["lws"], 0, CPU))
    scale = head.bias / start.bias
    assert torch.allclose(head.weight, scale[:, None] * start.weight, atol=1e-4) and (scale - 1).abs().max() > 0.01
    logits = torch.randn(4, 3)
    assert torch.equal(methods.scaled_logits(logits, torch.ones(3)), logits)


def test_los_brings_the_logits_close_together_and_needs_no_counts(start):
    head = methods.train_los(start, drawn(COUNTS, 0), Fit(methods.RECIPES["los"], 0, CPU))
    features = drawn(COUNTS, 1).features[:, 0]
    confidence = [each(features).detach().softmax(1).amax(1).mean().item() for each in (start, head)]
    assert confidence[0] > 0.8 and confidence[1] < 0.45  # of three classes, at least 1/3
    logits, target = torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 3, 0])
    wanted = torch.full((5, 4), 0.98 / 4, dtype=torch.float64)
    wanted[torch.arange(5), target] += 0.02
    expected = -(wanted * logits.log_softmax(1)).sum(1).mean()
    assert methods.over_smoothed_cross_entropy(logits, target).item() == pytest.approx(expected.item())


def test_los_keeps_the_head_that_a_score_rates_best(start):
    data, how = drawn(COUNTS, 0), Fit(methods.RECIPES["los"], 0, CPU)
    seen = []

    def score(head):
        seen.append(head)
        return -abs(len(seen) - 30)  # the 30th of the heads is the best

    head = methods.train_los(start, data, how, score)
    assert len(seen) >= 100 and torch.equal(head.weight, seen[29].weight)
    assert torch.equal(seen[-1].weight, methods.train_los(start, data, how).weight)


def test_label_aware_smoothing_is_label_smoothing_if_all_classes_have_one_amount():
    logits, target = torch.randn(6, 4).double(), torch.tensor([0, 1, 2, 3, 0, 1])
    for amount in (0.0, 0.3):
        expected = F.cross_entropy(logits, target, label_smoothing=amount)
        own = smoothed_losses(logits, target, torch.full((4,), amount).double()).mean()
        assert own.item() == pytest.approx(expected.item())
    assert smoothing_of_classes(torch.tensor([7, 7]), 0.4, 0.1).tolist() == [0.1, 0.1]
    amounts = smoothing_of_classes(torch.tensor([1000, 100, 10, 1]), 0.4, 0.1)
    assert amounts.tolist() == sorted(amounts.tolist(), reverse=True)


def test_a_disalign_gate_without_gain_and_offset_changes_nothing_and_its_loss_is_numpys():
    logits, features = torch.randn(5, 3).double(), torch.randn(5, WIDTH).double()
    zero = torch.zeros(3).double()
    assert torch.equal(gated_logits(logits, features, torch.randn(WIDTH).double(), torch.zeros(1), zero, zero), logits)
    target, prior = torch.tensor([0, 1, 2, 0, 0]), np.array([0.8, 0.15, 0.05])
    weights = prior**-1.2 / (prior**-1.2).sum() * 3
    log_p = logits.log_softmax(1).numpy()[np.arange(5), target]
    expected = -(weights[target] * log_p).sum() / weights[target].sum()
    own = weighted_cross_entropy(logits, target, class_weights(torch.from_numpy(np.log(prior))))
    assert own.item() == pytest.approx(expected)


def test_the_sampler_draws_classes_and_images_of_a_class_uniformly_and_no_class_without_images():
    labels = torch.tensor([0] * 90 + [2] * 9 + [3])
    drawn_rows = ClassSampler(labels, 5).draw(30_000, torch.Generator().manual_seed(0))
    shares = torch.bincount(labels[drawn_rows], minlength=5) / 30_000
    assert torch.allclose(shares, torch.tensor([1 / 3, 0, 1 / 3, 1 / 3, 0]), atol=0.01)
    of_class_2 = torch.bincount(drawn_rows, minlength=100)[90:99] / 10_000
    assert torch.allclose(of_class_2, torch.full((9,), 1 / 9), atol=0.015)


def test_a_seed_gives_one_head_and_another_seed_another():
    data, recipe = drawn(COUNTS, 0, views=3), Recipe(2, 64, 0.2)
    heads = [methods.train_linear(data, Fit(recipe, seed, CPU)).weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_a_learning_rate_that_overflows_is_reported():
    with pytest.raises(NotFiniteError, match="not finite"):
        methods.train_linear(drawn(COUNTS, 0), Fit(Recipe(2, 64, 1e38, 5e-4), 0, CPU))


def test_the_scale_of_a_head_bounds_the_change_of_a_logit(start):
    gated = LinearHead(WIDTH, 3, gated=True)
    torch.nn.init.normal_(gated.weight)
    torch.nn.init.constant_(gated.gain, 0.5)
    assert start.scale == pytest.approx(float(start.weight.norm(dim=1).max()))
    assert gated.scale == pytest.approx(1.5 * float(gated.weight.detach().norm(dim=1).max()))
    with torch.no_grad():
        gated.gain.fill_(-4)  # at a gate of 1 the factor of the logits is -3
    assert gated.scale == pytest.approx(3 * float(gated.weight.detach().norm(dim=1).max()))


def test_a_virtual_step_is_a_step_of_gradient_descent_and_has_a_gradient():
    weight, bias = torch.randn(3, 4, requires_grad=True), torch.zeros(3, requires_grad=True)
    features, target = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    amount = torch.tensor(1.0, requires_grad=True)
    stepped = Head(weight, bias).stepped(amount * F.cross_entropy(Head(weight, bias)(features), target), 0.5)
    own = [tensor.detach().clone().requires_grad_() for tensor in (weight, bias)]
    optimiser = torch.optim.SGD(own, lr=0.5)
    F.cross_entropy(Head(*own)(features), target).backward()
    optimiser.step()
    assert torch.allclose(stepped.weight, own[0]) and torch.allclose(stepped.bias, own[1])
    assert torch.autograd.grad(F.cross_entropy(stepped(features), target), amount)[0] != 0


def test_the_meta_sampler_draws_a_class_by_its_images_times_its_rate():
    data = drawn(COUNTS, 0)
    head = Head(torch.zeros(3, WIDTH), torch.zeros(3))
    sampler = MetaSampler(head, data, torch.zeros(3), 0.1, 0)
    for rates in ([0.0, 0.0, 0.0], [-2.0, 0.0, 3.0]):
        with torch.no_grad():
            sampler.logit_rate.copy_(torch.tensor(rates))
        features, labels, weight = sampler.draw(20000)
        share = torch.tensor(COUNTS) * torch.tensor(rates).sigmoid()
        assert torch.allclose(labels.bincount() / 20000, share / share.sum(), atol=0.015)
        assert torch.equal(weight.detach(), torch.ones(20000)) and weight.requires_grad
        assert torch.allclose(features.norm(dim=1), torch.full((20000,), NORM), rtol=1e-4)


def test_the_meta_sampler_learns_to_draw_the_rarest_class_more_often():
    data = drawn(COUNTS, 0)
    weight, bias = torch.zeros(3, WIDTH, requires_grad=True), torch.zeros(3, requires_grad=True)
    sampler = MetaSampler(Head(weight, bias), data, torch.zeros(3), 0.2, 0)
    balanced, generator = ClassSampler(data.labels, 3), torch.Generator().manual_seed(0)
    for _ in range(60):
        rows = balanced.draw(64, generator)
        sampler(data.batch(rows, CPU, generator), data.labels[rows])
    rates = sampler.logit_rate.detach()
    assert rates[2] > rates[0] + 0.1


def test_metasaug_without_variance_is_cross_entropy_with_class_weights_and_grows_with_the_variance():
    data = drawn(COUNTS, 0)
    same = TrainingFeatures(data.features[data.labels.argsort(stable=True)][[0, 400, 460]][data.labels], data.labels, 3)
    assert class_variances(same).max() < 1e-3
    expected = [scaled(data.features[data.labels == c, 0]).double().numpy().var(0) for c in range(3)]
    assert np.allclose(class_variances(data), expected, rtol=1e-4)
    head = Head(0.1 * torch.randn(3, WIDTH).requires_grad_(), torch.zeros(3, requires_grad=True))
    rows = torch.arange(len(data.labels))
    values = []
    for features in (same, data):
        loss = MetaSAug(head, features, 0.1, 2, 0)
        batch = scaled(data.features[rows, 0])
        values.append([loss(batch, data.labels).item() for _ in range(2)])  # strength 0, then 0.375
    effective = (1 - 0.9999 ** np.array(COUNTS)) / 1e-4
    weights = torch.tensor(3 / effective / (1 / effective).sum()).float()
    plain = (weights[data.labels] * F.cross_entropy(head(batch), data.labels, reduction="none")).mean()
    assert values[0] == pytest.approx([plain.item()] * 2, rel=1e-3) and values[1][0] == pytest.approx(
        plain.item(), rel=1e-4
    )
    assert values[1][1] > values[1][0] + 0.01


def test_batches_are_smaller_and_epochs_more_where_images_are_few():
    length = length_of(methods.RECIPES["crt"], 472)
    assert (length.batch, length.steps, length.epochs) == (23, 20, 50)
    large = length_of(methods.RECIPES["crt"], 115_846)
    assert (large.batch, large.steps, large.epochs) == (512, 226, 10)
