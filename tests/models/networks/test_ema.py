"""Exponential moving average of weights: recurrence in plain numbers, statistics averaged, counters copied."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.networks.ema import WeightAverage


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()


def shaken(network: nn.Module) -> None:
    """Change weights and statistics, as a training step does."""
    network.train()
    network(torch.randn(8, 3, dtype=torch.float64))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter))


def test_the_average_follows_its_recurrence_and_begins_fast():
    network = small_network()
    average = WeightAverage(network, 0.5)
    expected = {name: value.clone() for name, value in network.state_dict().items()}
    for n in range(12):
        shaken(network)
        average.update(network)
        decay = min(0.5, (1 + n) / (10 + n))
        for name, value in network.state_dict().items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value
            else:
                expected[name] = value.clone()
    actual = average.average.state_dict()
    for name, value in expected.items():
        assert torch.allclose(actual[name], value, rtol=1e-6, atol=1e-7), name
    assert actual["1.num_batches_tracked"] == 12


def test_the_average_is_apart_from_the_network_and_takes_no_gradient():
    network = small_network()
    average = WeightAverage(network, 0.9)
    shaken(network)
    assert not torch.equal(average.average[0].weight, network[0].weight)
    assert not any(parameter.requires_grad for parameter in average.parameters())


def test_the_state_of_the_average_can_be_restored():
    network = small_network()
    first, second = WeightAverage(network, 0.9), WeightAverage(network, 0.9)
    shaken(network)
    first.update(network)
    second.load_state_dict(first.state_dict())
    shaken(network)
    first.update(network)
    second.update(network)
    for one, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1])
def test_a_decay_that_averages_nothing_is_rejected(decay):
    with pytest.raises(ValueError, match=f"decay is {decay}"):
        WeightAverage(small_network(), decay)
