"""What a step of the teacher minimises: L_cls (Eq. 6) of one view, plain or mixed; the student's first term too.

An objective is a module from a batch of views to a dict of named scalar losses whose `loss` entry is the one to descend.
It says by `views` how many it wants, has `after_step` called after every optimiser step, and keeps what training changes in
its state_dict, from which only the frozen `teacher.` may be left out. A batch that is taken in parts is announced to
`whole_batch`, and what that gives accompanies each part; the mean over the parts is then the batch's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn

from models.losses.adjusted_cross_entropy import adjusted_cross_entropy, mixed_cross_entropy
from models.networks.cosine_classifier import ImageClassifier


class Mixed(NamedTuple):
    """Of a mixed classifier view (CutMix, Mixup): the partners' labels, int64 [B], and the share of its own, float [B]."""

    target: Tensor
    share: Tensor

    def rows(self, start: int, stop: int) -> Mixed:
        """Those of a part of the batch."""
        return Mixed(self.target[start:stop], self.share[start:stop])


class TeacherObjective(nn.Module):
    """L_cls alone, on one view: Eq. 6, or plain cross-entropy where `adjustment`, the strength in the loss, is 0."""

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
        sample_ids: Tensor,  # noqa: ARG002 - same call as the student's
        mixed: Mixed | None = None,
        whole: None = None,  # noqa: ARG002 - likewise
    ) -> dict[str, Tensor]:
        """views [1,B,3,H,W], target [B], sample_ids [B] → {loss, classification}, scalars."""
        _, logits = self.model(views[0])
        loss = classification_loss(logits, target, self.log_prior, self.adjustment, mixed)
        return {"loss": loss, "classification": loss.detach()}

    def whole_batch(self, views: Iterable[Tensor], target: Tensor, sample_ids: Tensor) -> None:
        """Parts of a batch share nothing here."""

    def after_step(self) -> None:
        """Nothing follows the weights here."""

    def observations(self) -> dict[str, float]:
        """What is worth a look after an epoch besides the loss: nothing."""
        return {}

    def batch_modules(self) -> list[nn.Module]:
        """Modules that see a share of the batch where ranks share it, so that their batch norm needs the others' shares."""
        return [self.model]

    def undecayed(self) -> list[nn.Parameter]:
        """Parameters without weight decay: none (as in the official code)."""
        return []


def classification_loss(
    logits: Tensor, target: Tensor, log_prior: Tensor, adjustment: float, mixed: Mixed | None
) -> Tensor:
    """L_cls of plain or mixed images."""
    if mixed is None:
        return adjusted_cross_entropy(logits, target, log_prior, adjustment)
    return mixed_cross_entropy(logits, target, mixed.target, mixed.share, log_prior, adjustment)
