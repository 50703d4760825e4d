"""Objective: the interface between a loss and the training engine.

An objective maps a batch of views to a dict of named scalar losses; its `loss` entry is minimised. Everything that training
changes is in its state_dict; only the frozen `teacher.` entries may be excluded from a checkpoint. The engine calls:

    objective.begin_epoch(epoch, epochs)                        # before the first step of an epoch, again on resume
    whole = objective.whole_batch(micro_batches, target, ids)   # with gradient accumulation
    objective(views, target, ids, mixed, whole)["loss"].backward()
    optimiser.step()
    objective.after_step()
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from models.networks.cosine_classifier import ImageClassifier
from models.objectives.accumulation import WholeBatch


class Objective(nn.Module):
    """Base of the objectives; each method has a default that suits a loss without memory. Subclasses define `forward`.

    model: the trained network. views: number of views of each image that a step needs. companion: power of a ClassSampler that
    draws a second batch in each step; None: no second batch. The images of both then alternate: rows 0, 2, 4, ... are the
    batch, rows 1, 3, 5, ... the second one, so that ranks and micro-batches have equal parts of both.
    """

    model: ImageClassifier
    views: int = 1
    companion: float | None = None

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Start the 0-based epoch out of `epochs`. May only write into buffers: a captured step replays them. Nothing here."""

    def whole_batch(
        self,
        views: Iterable[Tensor],  # noqa: ARG002 - for the objectives below
        target: Tensor,  # noqa: ARG002 - for the objectives below
        sample_ids: Tensor,  # noqa: ARG002 - for the objectives below
    ) -> WholeBatch | None:
        """Compute what the micro-batches of one batch share, before the first; passed to each. None: they share no values.

        views: this rank's share of the batch as micro-batches [V,b,3,H,W]; target, sample_ids: int64 [B]. The mean over the
        micro-batches is then the value of the batch.
        """
        return None

    def after_step(self) -> None:
        """Called after every optimiser step. Nothing here: no module follows the weights."""

    def observations(self) -> dict[str, float]:
        """Further values for the record of an epoch: none here."""
        return {}

    def batch_modules(self) -> list[nn.Module]:
        """Modules whose input is this rank's share of the batch; their batch norm must be synchronised over the ranks."""
        return [self.model]

    def undecayed(self) -> list[nn.Parameter]:
        """Parameters without weight decay: none here."""
        return []
