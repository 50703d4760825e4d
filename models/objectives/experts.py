"""Objectives of a network with several experts, on one view, without a teacher: RIDE, SADE, NCL, ResLT; BBN."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.experts.backbone import ExpertBackbone
from models.experts.losses import (
    bbn_features,
    bbn_loss,
    diversity_temperatures,
    ncl_loss,
    reslt_groups,
    reslt_loss,
    ride_diversity,
    sade_loss,
)
from models.losses.class_loss import ClassLoss, Mixed
from models.networks.cosine_classifier import CosineClassifier, ImageClassifier
from models.objectives.objective import Objective


class ExpertsLoss(nn.Module):
    """Loss of several experts: forward(logits [B,E,C], target [B] int64) → a scalar."""

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Start the 0-based epoch out of `epochs`; may only write into buffers. Does nothing here."""


class Ride(ExpertsLoss):
    """RIDE: a class loss of each expert, summed, minus diversity * `ride_diversity`.

    loss: LDAM, with class weights that apply after a share of the epochs, in the authors' code. The temperatures of the
    diversity, with the factor `reweight`, apply from the same epoch on.
    """

    temperature: Tensor
    late_temperature: Tensor

    def __init__(self, loss: ClassLoss, reweight: float, diversity: float) -> None:
        super().__init__()
        self.loss, self.diversity = loss, diversity
        late = diversity_temperatures(loss.log_prior.exp(), reweight)
        self.register_buffer("temperature", torch.ones_like(late))
        self.register_buffer("late_temperature", late, persistent=False)

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Set class weights and temperatures of the epoch."""
        self.loss.begin_epoch(epoch, epochs)
        late = self.loss.weights_apply(epoch, epochs)
        self.temperature.copy_(self.late_temperature if late else torch.ones_like(self.temperature))

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """See ExpertsLoss."""
        experts = logits.shape[1]
        classification: Tensor = experts * self.loss(logits.flatten(0, 1), target.repeat_interleave(experts))
        return classification - self.diversity * ride_diversity(logits, self.temperature)


class Sade(ExpertsLoss):
    """SADE, see `sade_loss`."""

    log_prior: Tensor

    def __init__(self, log_prior: Tensor, strength: float) -> None:
        super().__init__()
        self.strength = strength
        self.register_buffer("log_prior", log_prior, persistent=False)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """See ExpertsLoss."""
        return sade_loss(logits, target, self.log_prior, self.strength)


class Ncl(ExpertsLoss):
    """NCL, see `ncl_loss`. log_counts: [C], log of the number of training images of each class."""

    log_counts: Tensor

    def __init__(self, log_counts: Tensor, hard_classes: int, divergence: float) -> None:
        super().__init__()
        self.hard_classes, self.divergence = hard_classes, divergence
        self.register_buffer("log_counts", log_counts, persistent=False)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """See ExpertsLoss."""
        return ncl_loss(logits, target, self.log_counts, self.hard_classes, self.divergence)


class Reslt(ExpertsLoss):
    """ResLT, see `reslt_loss`. counts: [C] training images; leave_out: as `shares` of `reslt_groups`."""

    groups: Tensor

    def __init__(self, counts: Tensor, leave_out: tuple[float, float], beta: float) -> None:
        super().__init__()
        self.beta = beta
        self.register_buffer("groups", reslt_groups(counts, leave_out), persistent=False)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """See ExpertsLoss."""
        return reslt_loss(logits, target, self.groups, self.beta)


class ExpertsObjective(Objective):
    """A loss on the logits of each expert of a network with an ExpertBackbone, of one view."""

    def __init__(self, model: ImageClassifier, loss: ExpertsLoss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Set the values of the loss that depend on the epoch."""
        self.loss.begin_epoch(epoch, epochs)

    def forward(
        self,
        views: Tensor,
        target: Tensor,
        sample_ids: Tensor,  # noqa: ARG002 - the interface of Objective
        mixed: Mixed | None = None,
        whole: None = None,  # noqa: ARG002 - the interface of Objective
    ) -> dict[str, Tensor]:
        """views [1,B,3,H,W], target [B], sample_ids [B] → {loss, classification}. Raises ValueError for mixed labels."""
        if mixed is not None:
            raise ValueError("the losses of experts need one label per image; the batch has mixed images")
        loss = self.loss(expert_logits(self.model, views[0]), target)
        return {"loss": loss, "classification": loss.detach()}


def expert_logits(model: ImageClassifier, images: Tensor) -> Tensor:
    """Logits of each expert, images [B,3,H,W] → [B,E,C].

    Their mean is the logits of the network. For experts with one linear classifier, whose logits are added, they are
    multiplied by tau_s = 1/E less: their sum is the logits of the network.
    """
    backbone, classifier = model.backbone, model.classifier
    assert isinstance(backbone, ExpertBackbone)
    features = backbone(images, "each")
    if backbone.join == "unit":
        assert isinstance(classifier, CosineClassifier)
        return classifier.part_cosines(features) / model.tau_s
    logits: Tensor = classifier(features.flatten(0, 1)).unflatten(0, features.shape[:2])
    return logits / (model.tau_s * backbone.experts)


class BbnObjective(Objective):
    """BBN (Zhou et al., CVPR 2020): one branch for the batch and one for a second batch of reversed class shares.

    The weight of the first branch falls from 1 to 0 during training, 1 - (epoch / epochs)². The network is used with equal
    weights: W·[f_c; f_r] + b. power: of the sampling of the second batch; -1: the share of a class is as 1 / n_c.
    """

    first_share: Tensor

    def __init__(self, model: ImageClassifier, power: float) -> None:
        super().__init__()
        self.model, self.companion = model, power
        self.register_buffer("first_share", torch.ones(()))

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Set the weight of the first branch."""
        self.first_share.fill_(1 - (epoch / epochs) ** 2)

    def forward(
        self,
        views: Tensor,
        target: Tensor,
        sample_ids: Tensor,  # noqa: ARG002 - the interface of Objective
        mixed: Mixed | None = None,
        whole: None = None,  # noqa: ARG002 - the interface of Objective
    ) -> dict[str, Tensor]:
        """views [1,2B,3,H,W], target [2B], rows of both batches alternating → {loss, classification, first_share}.

        Batch norm uses each batch on its own, as in the authors' code. Raises ValueError for mixed labels.
        """
        if mixed is not None:
            raise ValueError("BBN mixes features and needs one label per image; the batch has mixed images")
        first, second = self.model.backbone(views[0], "separate").unbind(1)
        logits = self.model.classifier(bbn_features(first, second, self.first_share))
        loss = bbn_loss(logits, target[::2], target[1::2], self.first_share)
        return {"loss": loss, "classification": loss.detach(), "first_share": self.first_share.clone()}
