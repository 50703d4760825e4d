"""Parametric contrastive losses: PaCo (Cui et al. 2021) and GPaCo (Cui et al. 2023).

The class logits z_i + log prior are candidates of the anchor i beside the features of the batch and of a queue:
loss_i = -sum_j m_j log softmax_j / sum_j m_j, with m = 1 for the logit of the own class, alpha for features of the own
class, and 0 otherwise. The anchor itself is excluded.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from models.contrast.memories import FifoQueue
from models.contrast.terms import (
    ContrastInputs,
    ContrastTerm,
    KeyEncoder,
    OptionalInput,
    gather_views,
    own_columns,
    project,
)
from models.distributed import gather_batch
from models.networks.autocast import without_autocast
from models.prior import adjust_logits


def parametric_losses(
    class_logits: Tensor, exponent: Tensor, target: Tensor, candidate_class: Tensor, own: Tensor, alpha: float
) -> Tensor:
    """PaCo loss of each anchor: [N].

    class_logits: [N,C] with the prior added; exponent: [N,M], cosines of anchors and candidates divided by the
    temperature; target: [N] and candidate_class: [M] int64, -1 for a candidate of no class; own: [N] int64, the column
    of the anchor itself; alpha: weight of a feature of the anchor's class.
    """
    own = own[:, None]
    same = (target[:, None] == candidate_class).scatter(1, own, False)
    candidates = exponent.scatter(1, own, -torch.inf)
    positive = class_logits.gather(1, target[:, None]).squeeze(1) + alpha * torch.where(same, exponent, 0.0).sum(1)
    return torch.cat([class_logits, candidates], 1).logsumexp(1) - positive / (
        1 + alpha * same.sum(1).to(exponent.dtype)
    )


class PaCo(ContrastTerm):
    """PaCo: the classifier view is the query; the key is a view of the momentum encoder, and a queue holds earlier keys.

    head: projection head, features [N,D] → unit vectors [N,P]; its copy for the keys follows it with the momentum
    encoder. log_prior: [C]. The candidates are the queries and keys of all ranks and the queue; the keys of a batch are
    stored after its step. Raises ValueError at the first step if the queue's total is below the batch.
    """

    encoder: KeyEncoder = "momentum"
    on_classifier_view = True
    uses: tuple[OptionalInput, ...] = ("key", "logits")
    log_prior: Tensor

    def __init__(
        self, head: nn.Module, log_prior: Tensor, queue: FifoQueue, temperature: float, alpha: float = 0.05
    ) -> None:
        super().__init__()
        self.head, self.queue = head, queue
        self.temperature, self.alpha = temperature, alpha
        self.register_buffer("log_prior", log_prior)
        self._step: tuple[Tensor, Tensor] | None = None
        self._make_key_head()

    def _make_key_head(self) -> None:
        self.key_head = copy.deepcopy(self.head).requires_grad_(False)

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """The key head follows the query head."""
        return [(self.key_head, self.head)]

    def batch_features(self, inputs: ContrastInputs, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Features of the batch of all ranks, as candidates [M,P], and those to be stored [B,P]."""
        with torch.no_grad():
            keys = gather_batch(self.key_head(inputs.key))
        return torch.cat([gather_views(projected), keys]), keys

    def forward(self, inputs: ContrastInputs) -> dict[str, Tensor]:
        """Loss of a batch, the mean over the V * B anchors; see ContrastTerm."""
        self.check(inputs)
        assert inputs.logits is not None
        projected = project(self.head, inputs.queries)
        features, stored = self.batch_features(inputs, projected)
        labels = gather_batch(inputs.target)
        anchors = projected.flatten(0, 1)
        with without_autocast(anchors):
            candidates = torch.cat([features, self.queue.features.to(features.dtype)])
            exponent = anchors @ candidates.T / self.temperature
        candidate_class = torch.cat([labels.repeat(2), self.queue.labels])
        class_logits = adjust_logits(inputs.logits.flatten(0, 1), self.log_prior, 1.0)
        own = own_columns(projected)
        target = inputs.target.repeat(self.views)
        self._step = stored.detach(), labels
        losses = parametric_losses(class_logits, exponent, target, candidate_class, own, self.alpha)
        return {"loss": losses.mean()}

    def after_step(self) -> None:
        """Store the keys of the step."""
        if self._step is not None:
            self.queue.enqueue(*self._step)
            self._step = None


class GPaCo(PaCo):
    """GPaCo: both views are queries with class logits and gradient; no momentum encoder. The second view is stored."""

    views = 2
    encoder = "self"
    uses = ("logits",)

    def _make_key_head(self) -> None:
        """Not needed: both views use the query head."""

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """No module follows another."""
        return []

    def batch_features(self, inputs: ContrastInputs, projected: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Both views of all ranks [2B,P]; the second one is to be stored."""
        features = gather_views(projected)
        return features, features[len(features) // 2 :]
