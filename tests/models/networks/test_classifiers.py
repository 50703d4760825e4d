"""Linear and causal classifiers: golden values of TDE, equality of the folded form, running values."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from models.networks.cosine_classifier import (
    CausalClassifier,
    CosineClassifier,
    ImageClassifier,
    LinearClassifier,
    UnitRows,
)

X = torch.tensor([[3, 4, 0, 1], [1, 0, 2, 2]], dtype=torch.float64)
HEADS = {"cosine": CosineClassifier, "linear": LinearClassifier, "causal": partial(CausalClassifier, heads=4)}


def causal():
    classifier = CausalClassifier(4, 3).double()
    with torch.no_grad():
        classifier.weight.copy_(torch.tensor([[1, 0, 1, 0], [0, 2, 0, 1], [-3, 4, 1, 1]]))
    return classifier


def test_the_causal_classifier_has_the_golden_logits_in_training_and_after_it():
    # The authors' module gives the same values.
    classifier = causal()
    golden = [4.654545454545, 14.059114219114, 7.760643626263]
    assert classifier(X)[0].tolist() == pytest.approx(golden, abs=1e-10)
    classifier.mean_direction.copy_(torch.tensor([1, 1, 0, 1]))
    golden = [-3.490909090909, -5.848018648019, -2.210756595740]
    assert classifier.eval()(X)[0].tolist() == pytest.approx(golden, abs=1e-10)


@pytest.mark.parametrize("shape", [(200, 1280), (7, 33), (3, 1)])
def test_unit_rows_have_the_values_and_the_gradient_of_normalize_bit_for_bit(shape):
    draw = torch.Generator().manual_seed(0)
    matrix, gradient = (torch.randn(shape, generator=draw) for _ in range(2))
    matrix[-1] = 0
    results = []
    for unit in (UnitRows.apply, partial(F.normalize, dim=1)):
        weight = matrix.clone().requires_grad_()
        rows = unit(weight)
        results.append((rows.detach(), *torch.autograd.grad(rows, weight, gradient)))
    assert all(torch.equal(own, expected) for own, expected in zip(*results, strict=True))


def test_the_mean_direction_follows_training_batches_only_and_is_in_the_checkpoint():
    classifier = causal()
    classifier(X)
    classifier(2 * X)
    assert torch.allclose(classifier.mean_direction, 0.9 * X.mean(0) + 2 * X.mean(0))
    before = classifier.mean_direction.clone()
    classifier.eval()(X)
    assert torch.equal(classifier.mean_direction, before) and "mean_direction" in classifier.state_dict()
    assert not before.requires_grad


def test_without_a_mean_direction_or_alpha_the_causal_classifier_predicts_as_in_training():
    classifier, still = causal(), CausalClassifier(4, 3, alpha=0.0).double()
    still.weight = classifier.weight
    assert torch.allclose(classifier.eval()(X), classifier.train()(X))
    assert torch.allclose(still.train()(X), still.eval()(X))


def test_heads_that_do_not_divide_the_feature_are_refused():
    message = "heads is 6, which does not divide the feature's 64 values; expected a divisor such as 4$"
    with pytest.raises(ValueError, match=message):
        CausalClassifier(64, 5, heads=6)


@pytest.mark.parametrize("kind", HEADS)
def test_a_folded_classifier_gives_the_logits_of_the_network(kind):
    torch.manual_seed(0)
    tau_s = 0.1 if kind == "cosine" else 1.0
    model = ImageClassifier("resnet20", 5, tau_s, head=HEADS[kind])
    images = torch.rand(4, 3, 8, 8)
    model.train()(images)  # sets the running values
    features, logits = model.eval()(images)
    folded = model.folded()
    assert torch.allclose(folded.logits(features), logits, atol=1e-5)
    assert not folded.matrix.requires_grad


@pytest.mark.parametrize("kind", ["cosine", "causal"])
def test_the_scale_bounds_each_logit(kind):
    classifier = HEADS[kind](8, 20)
    for _ in range(20):
        classifier(torch.randn(16, 8) + 1)
    logits = classifier.eval()(100 * torch.randn(500, 8))
    assert logits.abs().max() <= classifier.scale


def test_the_linear_classifier_is_a_linear_layer_and_records_the_length_of_its_features():
    torch.manual_seed(0)
    classifier = LinearClassifier(8, 3)
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 3)
    features = 7 * F.normalize(torch.randn(32, 8), dim=1)
    assert torch.equal(classifier(features), layer(features))
    for _ in range(1000):
        classifier(features)
    assert classifier.length.item() == pytest.approx(7, rel=1e-3)
    assert classifier.scale == pytest.approx(7 * layer.weight.norm(dim=1).max().item(), rel=1e-3)
