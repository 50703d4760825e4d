"""Hybrid-SC: its weights over the epochs, the images of each part, and what gets a gradient."""

import pytest
import torch
import torch.nn.functional as F

from models.contrast.supcon import SupCon, supervised_losses
from models.losses.class_loss import ClassLoss
from models.networks.projection_head import ProjectionHead
from models.objectives.hybrid import HybridObjective
from tests.support.small_objectives import LOG_PRIOR, gradient, images_seen_by, network, views

TARGET = torch.tensor([0, 2, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2])  # of the batch and of the second one, alternating


def made():
    torch.manual_seed(2)
    term = SupCon(ProjectionHead(64, 64, 8), 0.1)
    return HybridObjective(network(), term, ClassLoss(LOG_PRIOR, 0.0), gamma=1.0, beta=1.0).train()


def test_the_loss_goes_from_the_contrast_of_the_batch_to_the_cross_entropy_of_the_second_batch():
    objective, batch = made(), views(2, 12)
    objective.begin_epoch(100, 200)
    seen = images_seen_by(objective.model)
    parts = objective(batch, TARGET, torch.arange(12))
    assert [len(images) for images in seen] == [18]
    reference = made()
    features, logits = reference.model(torch.cat([batch[0, ::2], batch[1, ::2], batch[0, 1::2]]))
    rows, labels = reference.term.head(features[:12]), TARGET[::2].repeat(2)
    losses = supervised_losses(rows @ rows.T / 0.1, labels[:, None] == labels, torch.arange(12))
    expected = losses.mean().item(), F.cross_entropy(logits[12:], TARGET[1::2]).item()
    assert (parts["contrast"].item(), parts["classification"].item()) == pytest.approx(expected, rel=1e-5)
    assert parts["loss"].item() == pytest.approx(0.75 * expected[0] + 0.25 * expected[1], rel=1e-5)  # epoch 101 of 200


@pytest.mark.parametrize(("epoch", "classifier"), [(0, False), (5, True)])
def test_the_first_epoch_trains_the_encoder_alone(epoch, classifier):
    objective = made()
    objective.begin_epoch(epoch, 10)
    objective(views(2, 12), TARGET, torch.arange(12))["loss"].backward()
    assert gradient(objective.model.backbone) > 0 and gradient(objective.term.head) > 0
    assert (gradient(objective.model.classifier) > 0) == classifier
