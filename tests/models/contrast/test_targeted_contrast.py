"""TSC: its loss against loops, its targets against the simplex, and the match of classes and targets."""

import math

import pytest
import torch

from models.contrast.kcl import KPositiveContrast, TargetedContrast, k_positive_losses, spread_targets
from models.contrast.memories import FifoQueue
from tests.support.contrast_cases import TARGET, TAU, VIEWS, V, filled, inputs, unchanged, unit


def term(classes=3, dim=2):
    return TargetedContrast(unchanged(), filled(FifoQueue(2, 2)) if dim == 2 else FifoQueue(8, dim), classes, TAU)


def test_the_loss_equals_its_slow_reference():
    query, key, queue, targets = unit(4, 5), unit(4, 5, seed=1), unit(12, 5, seed=2), unit(3, 5, seed=4)
    target, labels = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 1, 0, 2, 0, -1, 1, 0, 1, 0, 1])
    column, order = torch.tensor([2, 0, 1, 2]), torch.rand(12, generator=torch.Generator().manual_seed(3)).double()
    same = target[:, None] == labels
    losses = k_positive_losses(
        (query * key).sum(1) / TAU, query @ queue.T / TAU, same, order, 2, query @ targets.T / TAU, column, 0.2
    )
    for i in range(4):
        chosen = sorted((j for j in range(12) if labels[j] == target[i]), key=lambda j: -order[j])[:2]
        candidates = [key[i], *queue, *targets]
        log_sum = math.log(sum(math.exp(float(query[i] @ each) / TAU) for each in candidates))
        logs = [float(query[i] @ each) / TAU - log_sum for each in [key[i], *queue[chosen]]]
        own_target = float(query[i] @ targets[column[i]]) / TAU - log_sum
        assert losses[i].item() == pytest.approx(-(sum(logs) + 0.2 * own_target) / (len(logs) + 1), abs=1e-12)


@pytest.mark.parametrize("classes", [3, 6])
def test_targets_of_few_classes_are_a_simplex(classes):
    start = torch.nn.functional.normalize(torch.randn(classes, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    cosines = (lambda t: t @ t.T)(spread_targets(start, 0.07))
    others = cosines[~torch.eye(classes, dtype=torch.bool)]
    assert (others + 1 / (classes - 1)).abs().max() < 0.02


def test_classes_get_the_targets_next_to_their_centres_at_the_start_of_an_epoch_and_keep_them_on_resume():
    torch.manual_seed(0)
    made = term(classes=4, dim=8)
    made.begin_epoch(0, 3)
    assert made.matched.tolist() == [0, 1, 2, 3]
    made.centres.copy_(made.targets[[2, 0, 3, 1]])
    made.begin_epoch(1, 3)
    assert made.matched.tolist() == [2, 0, 3, 1]
    resumed = term(classes=4, dim=8)
    resumed.load_state_dict(made.state_dict())
    resumed.centres.copy_(made.targets)  # they moved since the start of the epoch
    resumed.begin_epoch(1, 3)
    assert resumed.matched.tolist() == [2, 0, 3, 1] and torch.equal(resumed.targets, made.targets)


def test_a_step_moves_the_centres_of_the_classes_in_the_batch_towards_their_mean_direction():
    made = term().double()
    made.begin_epoch(0, 2)
    made.centres.copy_(torch.tensor([[1, 0], [0, 1], [0, 1]]))
    made(inputs(VIEWS[:1], TARGET, key=V))["loss"].item()
    expected = torch.nn.functional.normalize(0.9 * torch.tensor([1.0, 0]) + 0.1 * VIEWS[0, 0], dim=0)
    assert torch.allclose(made.centres[0], expected) and made.centres[1].tolist() == [0, 1]


def test_with_targets_far_away_and_without_weight_it_is_kcl_but_for_the_divisor():
    kcl = KPositiveContrast(unchanged(), filled(FifoQueue(2, 2)), TAU)
    batch = inputs(VIEWS[:1, :1], TARGET[:1], torch.tensor([0]), key=V[:1])
    own, far = kcl(batch)["loss"].item(), torch.full((1, 3), -1e4, dtype=torch.float64)
    query = VIEWS[0, :1]
    losses = k_positive_losses(
        (query * V[:1]).sum(1) / TAU, query @ kcl.queue.features.T / TAU, TARGET[:1, None] == kcl.queue.labels,
        torch.ones(2).double(), 6, far, TARGET[:1], 0.0,
    )  # fmt: skip
    assert losses.item() == pytest.approx(own * 2 / 3, abs=1e-12)
