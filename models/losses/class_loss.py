"""L_cls by name: a loss per sample, class weights, and the one place that averages them over the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.distributed import mean_over_ranks
from models.losses.adjusted_cross_entropy import adjusted_cross_entropy
from models.losses.per_sample import (
    class_balanced_weights,
    class_margins,
    focal_losses,
    lade_penalty,
    margin_losses,
    sigmoid_focal_losses,
    smoothed_losses,
    smoothing_of_classes,
)
from models.prior import adjust_logits


class Mixed(NamedTuple):
    """Labels of a mixed view (CutMix, Mixup): labels of the partners, int64 [B], and the share of the own label, float [B]."""

    target: Tensor
    share: Tensor

    def rows(self, start: int, stop: int) -> Mixed:
        """The labels of samples start..stop, a part of the batch."""
        return Mixed(self.target[start:stop], self.share[start:stop])


class Weighting(NamedTuple):
    """Class weights of a loss. counts: [C] training images; beta: of the effective number of Cui et al. 2019.

    after: share of the epochs before the weights apply (deferred re-weighting, DRW, of Cao et al. 2019); 0: from the start.
    average: `batch` divides the weighted losses by B, `weights` by the sum of the weights in the batch, as PyTorch's
    cross-entropy and all published DRW codes do.
    """

    counts: Sequence[int]
    beta: float
    after: float = 0.0
    average: Literal["batch", "weights"] = "batch"


class ClassLoss(nn.Module):
    """Cross-entropy of logits + strength · log prior (Eq. 6), and the base of the other losses, which replace `losses`.

    Buffer class_weight [C] if the loss has a weighting: ones until its epoch. It is written in place, so that a captured
    step stays valid, and is part of the state.
    """

    log_prior: Tensor
    class_weight: Tensor | None
    balanced: Tensor

    def __init__(self, log_prior: Tensor, strength: float = 1.0, weighting: Weighting | None = None) -> None:
        super().__init__()
        self.strength, self.weighting = strength, weighting
        # Constants are not part of the state.
        self.register_buffer("log_prior", log_prior, persistent=False)
        self.register_buffer("class_weight", None if weighting is None else torch.ones_like(log_prior))
        if weighting is not None:
            weights = torch.from_numpy(class_balanced_weights(weighting.counts, weighting.beta)).to(log_prior)
            self.register_buffer("balanced", weights, persistent=False)
            self.begin_epoch(0, 1)

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Set the class weights of the 0-based epoch out of `epochs`."""
        if self.class_weight is not None:
            if self.weights_apply(epoch, epochs):
                self.class_weight.copy_(self.balanced)
            else:
                self.class_weight.fill_(1.0)

    def weights_apply(self, epoch: int, epochs: int) -> bool:
        """Whether the loss has class weights in the 0-based epoch out of `epochs`."""
        return self.weighting is not None and epoch >= math.floor(self.weighting.after * epochs + 1e-9)

    def losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Loss of each sample: logits [B,C] without a prior, target [B] int64 → [B]."""
        return F.cross_entropy(self.adjusted(logits), target, reduction="none")

    def adjusted(self, logits: Tensor) -> Tensor:
        """The logits with `strength` times the log prior added."""
        adjusted: Tensor = adjust_logits(logits, self.log_prior, self.strength)
        return adjusted

    def forward(self, logits: Tensor, target: Tensor, mixed: Mixed | None = None) -> Tensor:
        """Mean loss of the batch, a scalar. mixed: a second label of each sample and the share of the first; or None."""
        if type(self) is ClassLoss and self.class_weight is None and mixed is None:
            return adjusted_cross_entropy(logits, target, self.log_prior, self.strength)  # one kernel, and its rounding
        losses, weights = self._weighted(logits, target)
        if mixed is not None:
            others, other_weights = self._weighted(logits, mixed.target)
            losses = mixed.share * losses + (1 - mixed.share) * others
            weights = mixed.share * weights + (1 - mixed.share) * other_weights
        if self.weighting is None or self.weighting.average == "batch":
            return losses.mean()
        return losses.mean() / mean_over_ranks(weights.mean())

    def _weighted(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        losses = self.losses(logits, target)
        if self.class_weight is None:
            return losses, torch.ones_like(losses)
        weights = self.class_weight[target]
        return weights * losses, weights

    def start(self, classifier: nn.Module) -> None:
        """Change the initial values of a classifier. Does nothing here."""

    def undecayed(self, classifier: nn.Module) -> list[nn.Parameter]:  # noqa: ARG002 - for the losses below
        """Parameters of the classifier without weight decay: none here."""
        return []


class FocalLoss(ClassLoss):
    """Focal loss of the softmax probability; class weights multiply the whole loss and are not part of the modulator."""

    def __init__(self, log_prior: Tensor, strength: float, gamma: float, weighting: Weighting | None = None) -> None:
        super().__init__(log_prior, strength, weighting)
        self.gamma = gamma

    def losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """See ClassLoss."""
        return focal_losses(self.adjusted(logits), target, self.gamma)


class SigmoidFocalLoss(ClassLoss):
    """Sigmoid focal loss; with class weights the class-balanced focal loss (Cui et al. 2019). It has no logit adjustment."""

    def __init__(self, log_prior: Tensor, gamma: float, weighting: Weighting | None = None) -> None:
        super().__init__(log_prior, 0.0, weighting)
        self.gamma = gamma

    def losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """See ClassLoss."""
        return sigmoid_focal_losses(logits, target, self.gamma)

    @torch.no_grad()
    def start(self, classifier: nn.Module) -> None:
        """Start each probability at 1/C by the bias, as the authors' code does; else the many negatives dominate at first."""
        for bias in self.undecayed(classifier):
            bias.fill_(-math.log(len(bias) - 1))

    def undecayed(self, classifier: nn.Module) -> list[nn.Parameter]:
        """The bias, as in the authors' code."""
        bias = getattr(classifier, "bias", None)
        return [] if bias is None else [bias]


class LDAMLoss(ClassLoss):
    """LDAM: a margin of each class, for a cosine classifier. scale: 1 / tau_s, the logit of the cosine 1; margin: of the
    class with the fewest images, as a cosine."""

    margins: Tensor

    def __init__(
        self,
        log_prior: Tensor,
        strength: float,
        counts: Sequence[int],
        scale: float,
        margin: float = 0.5,
        weighting: Weighting | None = None,
    ) -> None:
        super().__init__(log_prior, strength, weighting)
        self.register_buffer("margins", (scale * class_margins(counts, margin)).to(log_prior), persistent=False)

    def losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """See ClassLoss."""
        return margin_losses(self.adjusted(logits), target, self.margins)


class SmoothingLoss(ClassLoss):
    """Cross-entropy with the smoothing `head` of the class with the most images to `tail` of the class with the fewest."""

    smoothing: Tensor

    def __init__(
        self,
        log_prior: Tensor,
        strength: float,
        counts: Sequence[int],
        head: float,
        tail: float,
        weighting: Weighting | None = None,
    ) -> None:
        super().__init__(log_prior, strength, weighting)
        amounts = smoothing_of_classes(torch.tensor(counts), head, tail).to(log_prior)
        self.register_buffer("smoothing", amounts, persistent=False)

    def losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """See ClassLoss."""
        return smoothed_losses(self.adjusted(logits), target, self.smoothing)


class LADELoss(ClassLoss):
    """LADE: adjusted cross-entropy + weight · R of the whole batch (`lade_penalty` with strength regulariser).

    R is not a mean over samples: it cannot be computed from micro-batches, and has no second label.
    """

    def __init__(self, log_prior: Tensor, strength: float, weight: float, regulariser: float) -> None:
        super().__init__(log_prior, strength)
        self.weight, self.regulariser = weight, regulariser

    def forward(self, logits: Tensor, target: Tensor, mixed: Mixed | None = None) -> Tensor:
        """See ClassLoss. Raises ValueError for mixed labels."""
        if mixed is not None:
            raise ValueError("LADE needs one label per image; its batch has mixed images")
        penalty = lade_penalty(logits, target, self.log_prior, self.regulariser)
        return super().forward(logits, target) + self.weight * penalty
