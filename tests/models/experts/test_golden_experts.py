"""Golden values of the losses of several experts in float64, from hand-written numpy of the papers' formulas.

The modules of the authors' code give the same value for RIDE, and for SADE and NCL but for their 1e-9 in the logarithm.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.class_sampler import ClassSampler
from models.experts.losses import (
    bbn_features,
    bbn_loss,
    ncl_loss,
    reslt_groups,
    reslt_loss,
    sade_loss,
)
from models.losses.class_loss import LDAMLoss, Weighting
from models.objectives.experts import Ride

COUNTS = torch.tensor([5, 3, 2])
PRIOR = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
TARGET = torch.tensor([0, 2])


def logits(*experts, scale=1.0):
    return scale * torch.tensor(experts, dtype=torch.float64).transpose(0, 1)


RIDE = logits([[0.6, 0.8, 0.28], [1, 0, -0.6]], [[0.7, 0.5, 0.1], [0.4, 0.2, 0.3]], scale=30)
Z = [[2, 0.5, -1], [1, 0, 0.5]]


def ride(epoch):
    """RIDE as its objective computes it, in one epoch of 200."""
    ldam = LDAMLoss(PRIOR.log(), 0.0, [5, 3, 2], 30, 0.5, Weighting([5, 3, 2], 0.9999, 0.8, "weights"))
    loss = Ride(ldam, reweight=0.05, diversity=0.45)
    loss.begin_epoch(epoch, 200)
    return loss(RIDE, TARGET).item()


def test_ride_has_the_golden_value_before_the_switch():
    assert ride(159) == pytest.approx(51.380970230914, abs=1e-10)


def test_ride_has_the_golden_value_after_the_switch():
    assert ride(160) == pytest.approx(63.658434528199, abs=1e-10)


@pytest.mark.parametrize("epochs", [7, 12, 27, 32, 90])
def test_class_weights_and_temperatures_of_ride_start_in_the_same_epoch(epochs):
    ldam = LDAMLoss(PRIOR.log(), 0.0, [5, 3, 2], 30, 0.5, Weighting([5, 3, 2], 0.9999, 0.8, "weights"))
    loss = Ride(ldam, reweight=0.05, diversity=0.45)
    for epoch in range(epochs):
        loss.begin_epoch(epoch, epochs)
        weighted = not torch.equal(ldam.class_weight, torch.ones(3))
        assert weighted == torch.equal(loss.temperature, loss.late_temperature)
        assert weighted == (10 * epoch >= 8 * epochs - 9)  # from epoch floor(.8 · epochs)


def test_sade_has_the_golden_value():
    third = logits([[0.2, 0.9, 0.1], [0.1, 0.3, 0.6]], scale=30)
    value = sade_loss(torch.cat([RIDE, third], 1), TARGET, PRIOR.log(), 2.0)
    assert value.item() == pytest.approx(38.810096011410, abs=1e-10)


def test_ncl_has_the_golden_value():
    value = ncl_loss(logits(Z, [[1, 1, 0], [0, 0.5, 1]]), TARGET, COUNTS.double().log(), 2, 0.6)
    assert value.item() == pytest.approx(3.878333004061, abs=1e-11)
    assert value.item() == pytest.approx(3.878332993921, abs=2e-8)  # the authors' module, log(p + 1e-9)


def test_reslt_has_the_golden_values():
    experts = logits(Z, [[0.5, 0, 0], [0, 0.2, 0.4]], [[0, 0, 0.3], [-0.5, 0, 1]])
    groups = reslt_groups(COUNTS, (1 / 3, 2 / 3)).double()
    assert groups.tolist() == [[1, 1, 1], [0, 1, 1], [0, 0, 1]]
    values = [reslt_loss(experts, TARGET, groups, beta).item() for beta in (1.0, 0.0, 0.995)]
    assert np.allclose(values, [0.699462796008, 0.259686452865, 0.697263914292], atol=1e-11, rtol=0)


def test_bbn_has_the_golden_value_in_epoch_101_of_200():
    first, second = torch.eye(2).double(), torch.tensor([[0, 1], [1, 1]]).double()
    share = torch.tensor(1 - (100 / 200) ** 2, dtype=torch.float64)
    weight = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0], [1, 1, 0, 0]]).double()
    z = bbn_features(first, second, share) @ weight.T
    assert bbn_loss(z, TARGET, torch.tensor([2, 1]), share).item() == pytest.approx(0.829543762489, abs=1e-11)


def test_the_reversed_shares_of_the_classes_have_the_golden_values():
    sampler = ClassSampler(torch.arange(3).repeat_interleave(COUNTS), 3, power=-1)
    assert np.allclose(sampler.shares, [0.193548387097, 0.322580645161, 0.483870967742], atol=1e-11, rtol=0)
