"""The optimiser: SGD and AdamW against their formulas, weight decay, and clipping of the gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.training.optimiser import Optimiser
from tests.support.small_training import made_objective, training_params


class Weights(torch.nn.Module):
    """An objective with two trained parameters; `temperature` has no weight decay."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        self.temperature = torch.nn.Parameter(torch.tensor(0.5))

    def undecayed(self) -> list[torch.nn.Parameter]:
        return [self.temperature]


GRADIENTS = [([0.3, -0.4, 0.0], 0.1), ([0.2, 0.1, -1.0], -0.2), ([0.0, 0.0, 2.0], 0.0)]


def descended(objective: Weights, **changes) -> tuple[list[float], list[float]]:
    """Take a step on each of GRADIENTS; return the parameters, and the norms that the steps returned."""
    optimiser, norms = Optimiser(objective, training_params(**changes)), []
    for weight, temperature in GRADIENTS:
        optimiser.zero_gradients()
        objective.weight.grad, objective.temperature.grad = torch.tensor(weight), torch.tensor(temperature)
        norms.append(optimiser.descend().item())
    return [*objective.weight.tolist(), objective.temperature.item()], norms


def all_gradients() -> np.ndarray:
    return np.array([[*weight, temperature] for weight, temperature in GRADIENTS])


def test_adamw_follows_its_formula_and_does_not_decay_the_temperature():
    actual, _ = descended(Weights(), optimizer="adamw", learning_rate=0.1, momentum=0.8, weight_decay=0.2)
    value, first, second = np.array([1.0, -2.0, 3.0, 0.5]), np.zeros(4), np.zeros(4)
    decay = np.array([0.2, 0.2, 0.2, 0.0])
    for step, gradient in enumerate(all_gradients(), start=1):
        value = value * (1 - 0.1 * decay)
        first = 0.8 * first + 0.2 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        value -= 0.1 * (first / (1 - 0.8**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    assert actual == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_bit_identical_to_that_of_pytorch(momentum):
    actual, _ = descended(Weights(), learning_rate=0.1, momentum=momentum, weight_decay=0.2)
    plain = Weights()
    groups = [{"params": [plain.weight], "weight_decay": 0.2}, {"params": [plain.temperature], "weight_decay": 0.0}]
    sgd = torch.optim.SGD(groups, lr=0.1, momentum=momentum)
    for weight, temperature in GRADIENTS:
        plain.weight.grad, plain.temperature.grad = torch.tensor(weight), torch.tensor(temperature)
        sgd.step()
    assert actual == [*plain.weight.tolist(), plain.temperature.item()]


def test_a_gradient_above_the_limit_is_scaled_to_it_and_one_below_it_is_unchanged():
    actual, norms = descended(Weights(), learning_rate=0.1, momentum=0.0, weight_decay=0.0, gradient_clip=1.0)
    lengths = np.linalg.norm(all_gradients(), axis=1)
    assert norms == pytest.approx(lengths)
    assert lengths[0] < 1 < lengths[1]
    clipped = all_gradients() / np.maximum(lengths, 1)[:, None]
    assert actual == pytest.approx(np.array([1.0, -2.0, 3.0, 0.5]) - 0.1 * clipped.sum(0), rel=1e-5)


@pytest.mark.parametrize(("optimizer", "momentum", "count"), [("sgd", 0.9, 1), ("sgd", 0.0, 0), ("adamw", 0.9, 3)])
def test_the_state_exists_before_the_first_step_and_is_all_that_a_step_changes(optimizer, momentum, count):
    objective = made_objective("student")
    optimiser = Optimiser(objective, training_params(optimizer=optimizer, momentum=momentum))
    state = optimiser.state()
    assert len(state) == count * len(optimiser.parameters)
    assert not any(tensor.any() for tensor in state)
    for parameter in optimiser.parameters:
        parameter.grad = torch.ones_like(parameter)
    optimiser.descend()
    assert [id(tensor) for tensor in optimiser.state()] == [id(tensor) for tensor in state]
    assert all(tensor.any() for tensor in state)
