"""Golden values of the second stages in float64, computed by hand-written numpy from the papers' formulas.

Of label-aware smoothing, the module of the authors' code (MiSLAS) gives the same value.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.losses.per_sample import class_margins, margin_losses, smoothed_losses, smoothing_of_classes
from models.networks.cosine_classifier import gated_logits
from models.second_stage.disalign import class_weights, weighted_cross_entropy
from models.second_stage.fitting import NORM, TrainingFeatures
from models.second_stage.metasaug import augmented_logits, class_variances
from models.second_stage.methods import over_smoothed_cross_entropy, scaled_logits
from models.second_stage.nearest_mean import nearest_mean
from models.second_stage.tau_norm import tau_normalised

COUNTS = torch.tensor([5, 3, 2])
LOGITS = torch.tensor([[2, 0.5, -1], [1, 0, 0.5]], dtype=torch.float64)
TARGET = torch.tensor([0, 2])
X = torch.tensor([[3, 4], [1, 0]], dtype=torch.float64)
WEIGHT = torch.tensor([[1, 0], [0, 2], [-3, 4]], dtype=torch.float64)
CLOSE = {"atol": 1e-11, "rtol": 0}


def test_label_aware_smoothing_has_the_golden_value():
    smoothing = smoothing_of_classes(COUNTS, 0.4, 0.1)
    assert np.allclose(smoothing, [0.4, 0.25, 0.1], **CLOSE)
    assert smoothed_losses(LOGITS, TARGET, smoothing).mean().item() == pytest.approx(1.010790483649, abs=1e-11)


def test_label_over_smoothing_has_the_golden_value():
    assert over_smoothed_cross_entropy(LOGITS, TARGET).item() == pytest.approx(1.445790483649, abs=1e-11)


def test_tau_normalised_logits_have_the_golden_values():
    logits = X @ tau_normalised(WEIGHT, 0.7).T
    assert np.allclose(logits[0], [3, 4.924577653380, 2.268919235370], **CLOSE)


def test_lws_has_the_golden_cross_entropy():
    scale = torch.tensor([1, 0.5, 0.2], dtype=torch.float64)
    losses = F.cross_entropy(scaled_logits(X @ WEIGHT.T, scale), TARGET, reduction="none")
    assert np.allclose(losses, [1.366137149312, 2.050932908009], **CLOSE)


def test_disalign_has_the_golden_gate_weights_and_losses_in_both_forms():
    gate, bias = torch.full((2,), 0.1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    gain = torch.tensor([1, 1.1, 1.2], dtype=torch.float64)
    offset = torch.tensor([0, 0.1, 0.2], dtype=torch.float64)
    open_gate = gated_logits(torch.zeros(2, 3, dtype=torch.float64), X, gate, bias, gain, torch.ones(3).double())
    assert np.allclose(open_gate[:, 0], [0.668187772168, 0.524979187479], **CLOSE)
    weights = class_weights((COUNTS.double() / COUNTS.sum()).log())
    assert np.allclose(weights, [0.512929675622, 0.946839408620, 1.540230915759], **CLOSE)
    losses = [
        weighted_cross_entropy(gated_logits(X @ WEIGHT.T, X, gate, bias, a, offset), TARGET, weights).item()
        for a in (gain, gain - 1)  # the code's form, and the paper's with the same numbers
    ]
    assert losses == pytest.approx([7.189331807041, 4.927376180257], abs=1e-11)


def test_the_nearest_class_mean_has_the_golden_scores():
    train = torch.tensor([[3, 4], [1, 0], [0, 2], [2, 2]], dtype=torch.float64)
    centre, weight, bias = nearest_mean(train[:, None], torch.tensor([0, 0, 1, 2]), 3)
    query = F.normalize(torch.tensor([1, 1], dtype=torch.float64) - centre, dim=0)
    assert np.allclose(weight @ query + bias, [-1.046865162347, -1.105572809000, -2.894427191000], **CLOSE)


def test_implicit_augmentation_with_the_margins_of_ldam_has_the_golden_value():
    features = torch.tensor([[1, 1], [0.5, -1]], dtype=torch.float64)
    weight = torch.tensor([[1, 0], [0, 2], [-1, 1]], dtype=torch.float64)
    losses = []
    for i, covariance in enumerate(([[0.5, 0.1], [0.1, 0.2]], [[0.3, 0], [0, 0.6]])):  # of the class of image i
        # (w_c - w_y)' S (w_c - w_y) does not depend on the basis, and in that of its eigenvectors S is diagonal.
        own_variance, basis = torch.linalg.eigh(torch.tensor(covariance, dtype=torch.float64))
        variance = torch.full((3, 2), 9, dtype=torch.float64)
        variance[TARGET[i]] = own_variance
        logits = augmented_logits(features @ weight.T, TARGET, weight @ basis, variance, 0.6)
        losses.append(margin_losses(logits, TARGET, class_margins(COUNTS.tolist()))[i].item())
    assert np.mean(losses) == pytest.approx(2.562156478291, abs=1e-11)


def test_the_variances_over_two_views_are_the_diagonal_of_the_golden_merge_of_two_batches():
    """The authors' code merges the covariance of each batch; `class_variances` reads all views, and has no covariances."""
    old = torch.tensor([[0.5**0.5, 0.5**0.5], [-(0.5**0.5), -(0.5**0.5)]], dtype=torch.float64)  # mean 0, variances 1/2
    new = torch.tensor([[1, 1], [3, 1]], dtype=torch.float64)
    views = torch.stack([old, new], dim=1)
    # A third component gives each feature the length that they are scaled to.
    views = torch.cat([views, (NORM**2 - views.square().sum(2, keepdim=True)).sqrt()], dim=2)
    variances = class_variances(TrainingFeatures(views, torch.zeros(2, dtype=torch.int64), 1))
    assert variances[0, :2].tolist() == pytest.approx([1.75, 0.5], rel=0, abs=1e-5)  # features are float32 once scaled
