"""The interface of a contrast term: inputs, result, and the calls around a training step.

A term owns its projection heads and its memory. The objective runs the networks and passes their features, so that
every term has the same call: `term(ContrastInputs(...))["loss"]`. The package's docstring shows the sequence of calls.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from models.distributed import gather_with_gradient, rank, rank_count

OptionalInput = Literal["key", "logits", "class_weight"]
KeyEncoder = Literal["self", "momentum", "teacher"]
DESCRIPTIONS: dict[OptionalInput, str] = {
    "key": "features [B,E] of the contrast encoder",
    "logits": "class logits [V,B,C] of the query views",
    "class_weight": "weights [C,D] of the classifier",
}


class ContrastInputs(NamedTuple):
    """Inputs of a contrast term: this rank's share of a batch.

    queries: [V,B,D] float, the student's features of V views, with gradient. target: [B] int64, class labels.
    sample_ids: [B] int64, indices of the images in the training split. key: [B,E] float, the contrast encoder's
    features of another view, without gradient. logits: [V,B,C] float, the class logits of the query views, without
    prior. class_weight: [C,D] float, the weights of the classifier. A term reads the last three only if its `uses`
    names them.
    """

    queries: Tensor
    target: Tensor
    sample_ids: Tensor
    key: Tensor | None = None
    logits: Tensor | None = None
    class_weight: Tensor | None = None


class ContrastTerm(nn.Module):
    """A loss that compares features, with its heads and its memory.

    forward(ContrastInputs) returns named scalar tensors; the entry `loss` has the gradient, the others are detached
    observations of the step. `views` is the number V of query views, `uses` names the optional inputs that the term
    needs. `encoder`: the contrast encoder. `momentum` gives the key of a view of its own, `teacher` that of the classifier
    view; with `self` there is no key, and all views carry gradients. `on_classifier_view`: the classifier view is the first
    query view.

    Everything that training changes is a parameter or a buffer, written in place, with static shapes and without a copy
    to the host. A captured CUDA graph therefore stays valid, and a state_dict resumes the run. Random choices are a
    function of a counter in a buffer. With several ranks, every rank stores the whole batch in rank order, so that the
    memories stay equal without a broadcast.
    """

    views: int = 1
    encoder: KeyEncoder = "self"
    on_classifier_view: bool = False
    uses: tuple[OptionalInput, ...] = ()

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Called before the first step of the 0-based epoch, again on resume; may only write into buffers. Nothing here."""

    def after_step(self) -> None:
        """Called after backward, at the end of every step: stores the features of the step. Does nothing here."""

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Pairs (follower, followed): the follower is updated together with the momentum encoder. None here."""
        return []

    def batch_modules(self) -> list[nn.Module]:
        """Modules whose input is this rank's share of the batch; their batch norm must be synchronised over the ranks."""
        return [module for module in self.children() if any(True for _ in module.parameters())]

    def undecayed(self) -> list[nn.Parameter]:
        """Parameters without weight decay: none here."""
        return []

    def check(self, inputs: ContrastInputs) -> None:
        """Raise ValueError if the number of views is wrong or an input that the term uses is missing."""
        name = type(self).__name__
        if inputs.queries.dim() != 3 or len(inputs.queries) != self.views:
            raise ValueError(
                f"queries of {name} have the shape {list(inputs.queries.shape)}; "
                f"expected [{self.views},B,D]: {self.views} query view(s) of each image"
            )
        for field in self.uses:
            if getattr(inputs, field) is None:
                raise ValueError(f"{field} is None, but {name} needs it; pass the {DESCRIPTIONS[field]}")


def project(head: nn.Module, features: Tensor) -> Tensor:
    """Apply a head to all views in one batch, so that its batch norm uses all of them: [V,B,D] → [V,B,P]."""
    views, batch = features.shape[:2]
    projected: Tensor = head(features.flatten(0, 1)).unflatten(0, (views, batch))
    return projected


def gather_views(features: Tensor) -> Tensor:
    """Gather all views of all ranks, differentiable: [V,b,P] → [V * ranks * b, P], views first, then ranks."""
    views = len(features)
    gathered = gather_with_gradient(features.transpose(0, 1).contiguous())
    return gathered.transpose(0, 1).reshape(views * gathered.shape[0], -1)


def own_columns(features: Tensor) -> Tensor:
    """Column of each local view of features [V,B,P] in the result of `gather_views`: int64 [V * B], views first."""
    views, batch = features.shape[:2]
    columns = torch.arange(batch, device=features.device) + rank() * batch
    first = torch.arange(views, device=features.device) * batch * rank_count()
    return (first[:, None] + columns).flatten()
