"""Golden values of the second stages in float64, computed by hand-written numpy from the papers' formulas.

Of label-aware smoothing, the module of the authors' code (MiSLAS) gives the same value.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.losses.per_sample import smoothed_losses, smoothing_of_classes
from models.networks.cosine_classifier import gated_logits
from models.second_stage.disalign import class_weights, weighted_cross_entropy
from models.second_stage.metasaug import augmented_logits
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


def test_implicit_augmentation_has_the_golden_value_and_its_diagonal_form_agrees():
    features = np.array([[1, 1], [0.5, -1]])
    weight = np.array([[1.0, 0], [0, 2], [-1, 1]])
    margins = 0.5 * (2 / np.array([5, 3, 2])) ** 0.25

    def loss(covariances):
        logits = features @ weight.T
        for i, own in enumerate((0, 2)):
            difference = weight - weight[own]
            logits[i] += 0.5 * 0.6 * np.einsum("cd,de,ce->c", difference, covariances[own], difference)
            logits[i, own] -= margins[own]
        return np.mean([np.log(np.exp(row).sum()) - row[own] for row, own in zip(logits, (0, 2), strict=True)])

    golden = {0: np.array([[0.5, 0.1], [0.1, 0.2]]), 2: np.diag([0.3, 0.6])}
    assert loss(golden) == pytest.approx(2.562156478291, abs=1e-11)
    variance = torch.tensor([[0.5, 0.2], [9, 9], [0.3, 0.6]], dtype=torch.float64)
    x, w = torch.tensor(features), torch.tensor(weight)
    logits = augmented_logits(x @ w.T, TARGET, w, variance, 0.6)
    logits[[0, 1], TARGET] -= torch.tensor(margins)[TARGET]
    diagonal = {0: np.diag([0.5, 0.2]), 2: np.diag([0.3, 0.6])}
    assert F.cross_entropy(logits, TARGET).item() == pytest.approx(loss(diagonal), abs=1e-11)
