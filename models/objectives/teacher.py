"""Teacher objective: L_cls (Eq. 6) of one view, plain or mixed. The student uses the same L_cls as its first term.

An objective is a module that maps a batch of views to a dict of named scalar losses; its `loss` entry is minimised.
`views` is the number of views that it needs. `after_step` is called after every optimiser step. Everything that
training changes is in its state_dict; only the frozen `teacher.` entries may be excluded from a checkpoint. For
gradient accumulation, `whole_batch` is called first with the whole batch and its result is passed with each
micro-batch; the mean over the micro-batches is then the value of the batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn

from models.losses.adjusted_cross_entropy import adjusted_cross_entropy, mixed_cross_entropy
from models.networks.cosine_classifier import ImageClassifier


class Mixed(NamedTuple):
    """Labels of a mixed view (CutMix, Mixup): labels of the partners, int64 [B], and the share of the own label, float [B]."""

    target: Tensor
    share: Tensor

    def rows(self, start: int, stop: int) -> Mixed:
        """The labels of samples start..stop, a part of the batch."""
        return Mixed(self.target[start:stop], self.share[start:stop])


class TeacherObjective(nn.Module):
    """L_cls on one view: Eq. 6, or plain cross-entropy if `adjustment` (strength of the logit adjustment) is 0."""

    views = 1
    log_prior: Tensor

    def __init__(self, model: ImageClassifier, log_prior: Tensor, adjustment: float = 1.0) -> None:
        super().__init__()
        self.model = model
        self.adjustment = adjustment
        self.register_buffer("log_prior", log_prior)

    def forward(
        self,
        views: Tensor,
        target: Tensor,
        sample_ids: Tensor,  # noqa: ARG002 - same signature as StudentObjective
        mixed: Mixed | None = None,
        whole: None = None,  # noqa: ARG002 - same signature as StudentObjective
    ) -> dict[str, Tensor]:
        """views [1,B,3,H,W], target [B], sample_ids [B] → {loss, classification}, scalar tensors."""
        _, logits = self.model(views[0])
        loss = classification_loss(logits, target, self.log_prior, self.adjustment, mixed)
        return {"loss": loss, "classification": loss.detach()}

    def whole_batch(self, views: Iterable[Tensor], target: Tensor, sample_ids: Tensor) -> None:
        """Does nothing: the micro-batches of the teacher share no values."""

    def after_step(self) -> None:
        """Does nothing: no module follows the weights of the teacher."""

    def observations(self) -> dict[str, float]:
        """Further values for the record of an epoch: none."""
        return {}

    def batch_modules(self) -> list[nn.Module]:
        """Modules whose input is this rank's share of the batch; their batch norm must be synchronised over the ranks."""
        return [self.model]

    def undecayed(self) -> list[nn.Parameter]:
        """Parameters without weight decay: none (as in the official code)."""
        return []


def classification_loss(
    logits: Tensor, target: Tensor, log_prior: Tensor, adjustment: float, mixed: Mixed | None
) -> Tensor:
    """L_cls of plain images (mixed is None) or of mixed images."""
    if mixed is None:
        return adjusted_cross_entropy(logits, target, log_prior, adjustment)
    return mixed_cross_entropy(logits, target, mixed.target, mixed.share, log_prior, adjustment)
