"""Objective of ConCutMix (Pan et al., 2024): BCL with CutMix of the classifier view, whose labels depend on the features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.contrast.memories import counter_random
from models.contrast.supcon import BalancedContrast
from models.distributed import rank
from models.losses.class_loss import Mixed
from models.networks.cosine_classifier import ImageClassifier
from models.networks.projection_head import ProjectionHead
from models.objectives.contrast import ContrastObjective
from models.objectives.student_weights import StudentWeights
from models.prior import adjust_logits

PROBABILITY = 0.5  # that an image is mixed; in the authors' code one draw, and one box, for the whole batch


def semantic_labels(
    feature: Tensor, centres: Tensor, mixed: Tensor, log_counts: Tensor, blend: Tensor | float, nearest: int
) -> Tensor:
    """Labels of mixed images, float [B,C]: a share of the similarity to the class centres, the rest of the mixed labels.

    feature: [B,P] and centres: [C,P], both before their L2 normalisation; mixed: [B,C], labels by area; log_counts: [C];
    blend: a scalar or [B]. The similarity is 1 / distance for the `nearest` centres and 0 for the others, with the sum 1. Its
    share is blend * log(sum_c n_c mixed_c) / sum_c log n_c, at most 1.
    """
    similarity = 1 / torch.cdist(feature, centres).clamp(min=torch.finfo(feature.dtype).tiny)
    nearest = min(nearest, len(centres))
    least = similarity.topk(nearest, dim=1).values[:, -1:]
    similarity = F.normalize(torch.where(similarity >= least, similarity, 0.0), p=1, dim=1)
    share = blend * (mixed * log_counts.exp()).sum(1).log() / log_counts.sum().clamp(min=1e-6)
    share = share.clamp(max=1)
    return share[:, None] * similarity + (1 - share[:, None]) * mixed


def paste(images: Tensor, partners: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    """CutMix on the device: images, partners [B,3,H,W], random float [B,4] in [0, 1) → mixed images, share of their own [B].

    A box of the share 1 - random_0 of the area (lambda ~ Beta(1,1)) around a random point, clipped, if random_3 is below
    PROBABILITY.
    """
    height, width = images.shape[2:]
    side = (1 - random[:, 0]).sqrt()
    edges = []
    for length, middle in ((height, random[:, 1]), (width, random[:, 2])):
        half, centre = (side * length).floor() / 2, (middle * length).floor()
        at = torch.arange(length, device=images.device)
        inside = (at >= (centre - half).floor()[:, None]) & (at < (centre + half).floor()[:, None])
        edges.append(inside & (random[:, 3] < PROBABILITY)[:, None])
    taken = edges[0][:, :, None] & edges[1][:, None, :]
    return torch.where(taken[:, None], partners, images), 1 - taken.to(images.dtype).mean((1, 2))


class ConCutMixObjective(ContrastObjective):
    """gamma·L_cls + beta·BCL; the classifier view is mixed with images of a second batch with equally likely classes.

    L_cls is a cross-entropy with the labels by area, and after `warm` of the epochs with `semantic_labels`.
    """

    companion = 0.0
    term: BalancedContrast
    blend: Tensor
    draws: Tensor
    log_counts: Tensor

    def __init__(
        self,
        model: ImageClassifier,
        log_prior: Tensor,
        weights: StudentWeights,
        term: BalancedContrast,
        *,
        log_counts: Tensor,
        blend: float,
        nearest: int,
        warm: float,
    ) -> None:
        """log_counts: [C], log of the number of training images; blend, nearest: of `semantic_labels`."""
        super().__init__(model, None, log_prior, weights, term)
        self.full_blend, self.nearest, self.warm = blend, nearest, warm
        self.register_buffer("log_counts", log_counts, persistent=False)
        self.register_buffer("blend", torch.zeros(()))
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Also set the share of the features in the labels."""
        super().begin_epoch(epoch, epochs)
        self.blend.fill_(self.full_blend if epoch >= round(self.warm * epochs) else 0.0)

    def after_step(self) -> None:
        """Also count the draws."""
        super().after_step()
        self.draws.add_(1)

    def forward(
        self, views: Tensor, target: Tensor, sample_ids: Tensor, mixed: Mixed | None = None, whole: None = None
    ) -> dict[str, Tensor]:
        """views [3,2B,3,H,W], target, sample_ids [2B], rows of both batches alternating; see ContrastObjective.

        Raises ValueError for images that are mixed already.
        """
        if mixed is not None:
            raise ValueError("ConCutMix mixes the images itself; the batch has mixed images")
        images = len(target) // 2
        random = counter_random(self.draws, (images, 4), offset=rank() * images * 4).to(views.dtype) / 2**62
        pasted, share = paste(views[0, ::2], views[0, 1::2], random)
        own = torch.cat([pasted[None], views[1:, ::2]])
        return super().forward(own, target[::2], sample_ids[::2], Mixed(target[1::2], share), whole)

    def classification(self, features: Tensor, logits: Tensor, target: Tensor, mixed: Mixed | None) -> Tensor:
        """Cross-entropy with the labels of the mixed images."""
        assert mixed is not None
        classes = torch.arange(logits.shape[1], device=target.device)
        own, pasted = ((each[:, None] == classes).to(logits.dtype) for each in (target, mixed.target))
        share = mixed.share[:, None].to(logits.dtype)
        labels = share * own + (1 - share) * pasted
        with torch.no_grad():
            head, centre_head = self.term.head, self.term.centre_head
            assert isinstance(head, ProjectionHead) and isinstance(centre_head, ProjectionHead)
            feature, centres = head.unscaled(features), centre_head.unscaled(self.model.classifier.weight)
            blend = self.blend * (mixed.share < 1)  # an image without a box keeps its label (authors' code)
            labels = semantic_labels(feature, centres, labels, self.log_counts, blend, self.nearest)
        adjusted = adjust_logits(logits, self.log_prior, self.weights.adjustment)
        return F.cross_entropy(adjusted, labels)
