"""Classification losses: golden values in float64 by hand-written numpy, weights, deferred re-weighting, mixed labels.

Where the official module gives the same value, the comment says so.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.losses.adjusted_cross_entropy import adjusted_cross_entropy, mixed_cross_entropy
from models.losses.class_loss import (
    ClassLoss,
    FocalLoss,
    LADELoss,
    LDAMLoss,
    Mixed,
    SigmoidFocalLoss,
    SmoothingLoss,
    Weighting,
)
from models.losses.per_sample import (
    class_balanced_weights,
    class_margins,
    focal_losses,
    lade_penalty,
    sigmoid_focal_losses,
)

COUNTS = [5, 3, 2]
LOG_PRIOR = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
LOGITS = torch.tensor([[2, 0.5, -1], [1, 0, 0.5]], dtype=torch.float64)
COSINES = torch.tensor([[0.6, 0.8, 0.28], [1, 0, -0.6]], dtype=torch.float64)
TARGET = torch.tensor([0, 2])
EXACT = {"rel": 0, "abs": 1e-10}


def value(loss, logits=LOGITS):
    return loss(logits, TARGET).item()


def test_cross_entropy_and_balanced_softmax_have_the_golden_values():
    rows = ClassLoss(LOG_PRIOR, 0.0).losses(LOGITS, TARGET)
    assert rows.tolist() == pytest.approx([0.241311296657, 1.180269670642], **EXACT)
    assert value(ClassLoss(LOG_PRIOR)) == pytest.approx(0.970033443423, **EXACT)  # also the official code's


@pytest.mark.parametrize(("gamma", "golden"), [(1, 0.434716770686), (2, 0.288797842030)])  # 1: also the official code's
def test_focal_has_the_golden_values(gamma, golden):
    assert value(FocalLoss(LOG_PRIOR, 0.0, gamma)) == pytest.approx(golden, **EXACT)


def test_class_balanced_weights_and_losses_have_the_golden_values():
    weights = [0.642890738415, 0.971476702172, 1.385632559413]
    assert class_balanced_weights(COUNTS, 0.9).tolist() == pytest.approx(weights, **EXACT)
    by_batch, by_weights = Weighting(COUNTS, 0.9), Weighting(COUNTS, 0.9, average="weights")
    assert value(ClassLoss(LOG_PRIOR, 0.0, by_batch)) == pytest.approx(0.895278441112, **EXACT)
    assert value(ClassLoss(LOG_PRIOR, 0.0, by_weights)) == pytest.approx(0.882689828676, **EXACT)
    assert value(SigmoidFocalLoss(LOG_PRIOR, 0.5, by_batch)) == pytest.approx(1.632662071642, **EXACT)
    assert value(SigmoidFocalLoss(LOG_PRIOR, 1.0, by_batch)) == pytest.approx(1.256112185071, **EXACT)
    assert value(FocalLoss(LOG_PRIOR, 0.0, 1.0, by_batch)) == pytest.approx(0.583143776305, **EXACT)


def test_ldam_has_the_golden_margins_rows_and_means_with_and_without_deferred_weights():
    assert class_margins(COUNTS).tolist() == pytest.approx([0.397635364384, 0.451801001805, 0.5], **EXACT)
    loss = LDAMLoss(LOG_PRIOR, 0.0, COUNTS, 30.0, weighting=Weighting(COUNTS, 0.9999, 0.8, "weights"))
    loss.begin_epoch(159, 200)
    assert loss.losses(30 * COSINES, TARGET).tolist() == pytest.approx([17.929061115738, 63], **EXACT)
    assert value(loss, 30 * COSINES) == pytest.approx(40.464530557869, **EXACT)  # also the official code's
    loss.begin_epoch(160, 200)
    assert value(loss, 30 * COSINES) == pytest.approx(50.121209134744, **EXACT)  # also the official code's


def test_smoothing_has_the_golden_values_of_mislas_and_of_label_over_smoothing():
    assert value(SmoothingLoss(LOG_PRIOR, 0.0, COUNTS, 0.4, 0.1)) == pytest.approx(
        1.010790483649, **EXACT
    )  # also official
    assert value(SmoothingLoss(LOG_PRIOR, 0.0, COUNTS, 0.98, 0.98)) == pytest.approx(1.445790483649, **EXACT)


def test_lade_adds_its_regulariser_to_balanced_softmax_with_the_golden_value():
    penalty = -0.189335460752  # also the official code's
    assert lade_penalty(LOGITS, TARGET, LOG_PRIOR, 0.1).item() == pytest.approx(penalty, **EXACT)
    assert value(LADELoss(LOG_PRIOR, 1.0, 0.5, 0.1)) == pytest.approx(0.970033443423 + 0.5 * penalty, **EXACT)
    with pytest.raises(ValueError, match="one label per image"):
        LADELoss(LOG_PRIOR, 1.0, 0.5, 0.1)(LOGITS, TARGET, Mixed(TARGET, torch.ones(2)))


def test_the_default_loss_is_bit_identical_to_the_functions_in_float32():
    logits, log_prior = 30 * torch.randn(64, 10), torch.rand(10).log()
    target, other, share = torch.randint(10, (64,)), torch.randint(10, (64,)), torch.rand(64)
    loss = ClassLoss(log_prior, 0.7)
    assert torch.equal(loss(logits, target), adjusted_cross_entropy(logits, target, log_prior, 0.7))
    mixed = mixed_cross_entropy(logits, target, other, share, log_prior, 0.7)
    assert torch.equal(loss(logits, target, Mixed(other, share)), mixed)


@pytest.mark.parametrize("average", ["batch", "weights"])
def test_mixed_labels_have_the_losses_and_the_weights_of_both_labels(average):
    other, share = torch.tensor([1, 1]), torch.tensor([0.3, 0.9], dtype=torch.float64)
    loss, w = (
        FocalLoss(LOG_PRIOR, 0.0, 1.0, Weighting(COUNTS, 0.9, average=average)),
        class_balanced_weights(COUNTS, 0.9),
    )
    losses = [focal_losses(LOGITS, labels, 1.0).numpy() for labels in (TARGET, other)]
    p = share.numpy()
    total = (p * w[TARGET] * losses[0] + (1 - p) * w[other] * losses[1]).sum()
    weights = (p * w[TARGET] + (1 - p) * w[other]).sum()
    expected = total / (2 if average == "batch" else weights)
    assert loss(LOGITS, TARGET, Mixed(other, share)).item() == pytest.approx(expected, **EXACT)


def test_class_weights_are_one_buffer_that_is_written_in_place_and_resumes():
    loss = ClassLoss(LOG_PRIOR, 0.0, Weighting(COUNTS, 0.9, after=0.5))
    buffer = loss.class_weight
    loss.begin_epoch(4, 10)
    assert set(buffer.tolist()) == {1.0}
    loss.begin_epoch(5, 10)
    assert loss.class_weight is buffer and buffer.tolist() == pytest.approx(
        class_balanced_weights(COUNTS, 0.9).tolist()
    )
    assert set(loss.state_dict()) == {"class_weight"} and set(ClassLoss(LOG_PRIOR).state_dict()) == set()


@pytest.mark.parametrize("after", [0.01, 0.29, 0.8, 0.99])
@pytest.mark.parametrize("epochs", [1, 7, 100])
def test_weights_always_apply_in_the_last_epoch(after, epochs):
    loss = ClassLoss(LOG_PRIOR, 0.0, Weighting(COUNTS, 0.9, after))
    loss.begin_epoch(epochs - 1, epochs)
    assert loss.class_weight[0] < 1


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_focal_losses_are_finite_with_finite_gradients_and_without_gamma_cross_entropy(gamma, scale):
    logits = (scale * torch.tensor([[1.0, -1.0, 0.2], [-1.0, 1.0, 0.1], [0.0, 0.0, 0.0]])).requires_grad_()
    target = torch.tensor([0, 0, 1])
    for losses in (focal_losses, sigmoid_focal_losses):
        rows = losses(logits, target, gamma)
        (gradient,) = torch.autograd.grad(rows.sum(), logits)
        assert rows.isfinite().all() and gradient.isfinite().all() and (rows >= 0).all()
    if not gamma:
        assert torch.allclose(focal_losses(logits, target, 0.0), F.cross_entropy(logits, target, reduction="none"))


def test_class_balanced_focal_starts_each_probability_at_one_in_c_and_does_not_decay_the_bias():
    layer = torch.nn.Linear(4, 10)
    loss = SigmoidFocalLoss(torch.zeros(10), 1.0)
    loss.start(layer)
    assert torch.sigmoid(layer.bias).detach().numpy() == pytest.approx(np.full(10, 0.1))
    assert loss.undecayed(layer) == [layer.bias] and FocalLoss(torch.zeros(10), 0.0, 1.0).undecayed(layer) == []


def test_a_class_without_images_counts_as_one_image():
    assert np.isfinite(class_balanced_weights([5, 0], 0.9)).all() and class_margins([16, 0]).tolist() == [0.25, 0.5]


def test_classes_of_one_size_have_equal_weights_and_margins():
    assert class_balanced_weights([7, 7, 7], 0.999).tolist() == pytest.approx([1, 1, 1])
    assert class_margins([7, 7]).tolist() == [0.5, 0.5]
    assert math.isfinite(value(LADELoss(torch.full((3,), 1 / 3, dtype=torch.float64).log(), 1.0, 0.1, 0.01)))
