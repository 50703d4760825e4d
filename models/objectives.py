"""What a training step minimises: the teacher's objective (L_cls) and the student's (all terms of Sec. 3.3).

Each is a module from a batch of views to a dict of named scalar losses whose `loss` entry is the one to descend.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.contrast_losses import ContrastLosses, KeyRuns, contrast_losses
from models.cosine_classifier import ImageClassifier
from models.losses import adjusted_cross_entropy, distillation_loss, mixed_cross_entropy
from models.precision import without_autocast
from models.projection_head import ProjectionHead
from models.queues import ClassQueues
from models.ranks import gather_batch


class Mixed(NamedTuple):
    """What the classifier view was mixed with (CutMix, Mixup): the partners' labels int64 [B], the share float [B] of its own."""

    target: Tensor
    share: Tensor


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
    ) -> dict[str, Tensor]:
        """views [1,B,3,H,W], target [B], sample_ids [B] → {loss, classification}, scalars."""
        _, logits = self.model(views[0])
        loss = classification_loss(logits, target, self.log_prior, self.adjustment, mixed)
        return {"loss": loss, "classification": loss.detach()}

    def after_step(self) -> None:
        """What follows the optimiser's step: nothing."""

    def observations(self) -> dict[str, float]:
        """What is worth a look after an epoch besides the loss: nothing."""
        return {}

    def undecayed(self) -> list[nn.Parameter]:
        """Parameters without weight decay: none (as in the official code)."""
        return []


@dataclass(frozen=True)
class StudentWeights:
    """Weights of the student's terms, as the official code has them: gamma of L_cls, beta of L_GML + L_tau, alpha of L_KD."""

    gamma: float
    beta: float
    alpha: float
    distillation_temperature: float
    prior_strength: float
    adjustment: float = 1.0


class StudentObjective(nn.Module):
    """gamma·L_cls + beta·(L_GML + L_tau) + alpha·L_KD on three views: classifier, query, key.

    The frozen teacher fills the class-wise queues with its feature of the key view *before* the loss, so a query always
    meets its own image's key; the whole queue is embedded afresh by the key head at every step. L_tau is L_GML with the
    similarities detached and the query's own image left out: its only gradient is to log tau_g (from the official code).
    """

    views = 3
    # The CUDA kernels of models.gml_kernel have never run on a GPU: set this once `benchmarks.gml_loss` vouches for them.
    fused_contrast = False
    log_prior: Tensor

    def __init__(
        self,
        model: ImageClassifier,
        teacher: ImageClassifier,
        log_prior: Tensor,
        counts: Sequence[int],
        weights: StudentWeights,
        *,
        tau_g: float,
        train_tau_g: bool,
        queue_total: int,
        queue_minimum: int,
        projection_dim: int,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.teacher = teacher.requires_grad_(False)
        self.teacher.eval()
        self.weights = weights
        self.register_buffer("log_prior", log_prior)
        self.query_head = ProjectionHead(model.feature_dim, model.feature_dim, projection_dim)
        # The key head starts as a copy of the query head; with a teacher of another width the copy is impossible.
        same_width = teacher.feature_dim == model.feature_dim
        self.key_head = (
            copy.deepcopy(self.query_head)
            if same_width
            else ProjectionHead(teacher.feature_dim, teacher.feature_dim, projection_dim)
        )
        self.log_tau_g = nn.Parameter(torch.tensor(tau_g).log(), requires_grad=train_tau_g)
        self.queues = ClassQueues(counts, queue_total, queue_minimum, teacher.feature_dim, generator)
        self._longest_run = int(self.queues.lengths.max())

    def train(self, mode: bool = True) -> StudentObjective:
        """Training mode for everything but the frozen teacher, whose batch norm keeps its running statistics."""
        super().train(mode)
        self.teacher.eval()
        return self

    def undecayed(self) -> list[nn.Parameter]:
        """Parameters without weight decay: log tau_g alone (as in the official code)."""
        return [self.log_tau_g]

    def after_step(self) -> None:
        """What follows the optimiser's step: nothing."""

    def observations(self) -> dict[str, float]:
        """Worth a look after an epoch: the share of the queues that holds features of training images."""
        return {"queue_fill": (self.queues.sample_ids >= 0).double().mean().item()}

    def forward(
        self, views: Tensor, target: Tensor, sample_ids: Tensor, mixed: Mixed | None = None
    ) -> dict[str, Tensor]:
        """views [3,B,3,H,W] (classifier, query, key), target [B], sample_ids [B] → named scalars, `loss` first."""
        batch = target.shape[0]
        classifier_view, query_view, key_view = views
        # One forward over both halves: they share a batch-norm batch of 2B.
        features, logits = self.model(torch.cat([classifier_view, query_view]))
        teacher_logits = self._remember(classifier_view, key_view, target, sample_ids)
        queries, keys = self.query_head(features[batch:]), self.key_head(self.queues.features)
        with without_autocast(queries):
            similarity = queries @ keys.T

        weights = self.weights
        logits = logits[:batch]
        classification = classification_loss(logits, target, self.log_prior, weights.adjustment, mixed)
        contrast = self._contrast(similarity, target, sample_ids)
        loss = weights.gamma * classification + weights.beta * contrast.gml
        parts = {"classification": classification, "gml": contrast.gml}
        if self.log_tau_g.requires_grad:
            parts["tau"] = contrast.tau
            loss = loss + weights.beta * contrast.tau
            parts["queries_without_keys"] = contrast.queries_without_keys
        if teacher_logits is not None:
            parts["distillation"] = distillation_loss(logits, teacher_logits, weights.distillation_temperature)
            loss = loss + weights.alpha * parts["distillation"]
        parts["tau_g"] = self.log_tau_g.exp()
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}}

    @torch.no_grad()
    def _remember(self, classifier_view: Tensor, key_view: Tensor, target: Tensor, sample_ids: Tensor) -> Tensor | None:
        """Enqueue the teacher's features of the key view; its logits of the classifier view, if distillation asks for them."""
        batch = target.shape[0]
        seen = torch.cat([classifier_view, key_view]) if self.weights.alpha else key_view
        features, logits = self.teacher(seen)
        # Every rank stores the whole batch, in rank order, so that the queues stay equal without being sent.
        self.queues.enqueue(gather_batch(features[-batch:]), gather_batch(target), gather_batch(sample_ids))
        return logits[:batch] if self.weights.alpha else None

    def _contrast(self, similarity: Tensor, target: Tensor, sample_ids: Tensor) -> ContrastLosses:
        queues = self.queues
        return contrast_losses(
            similarity,
            KeyRuns(queues.row_class, queues.starts, queues.lengths, self._longest_run),
            target,
            self.log_prior,
            self.log_tau_g.exp(),
            self.weights.prior_strength,
            query_ids=sample_ids,
            key_ids=queues.sample_ids,
            fused=self.fused_contrast,
        )


def classification_loss(
    logits: Tensor, target: Tensor, log_prior: Tensor, adjustment: float, mixed: Mixed | None
) -> Tensor:
    """L_cls of plain or mixed images."""
    if mixed is None:
        return adjusted_cross_entropy(logits, target, log_prior, adjustment)
    return mixed_cross_entropy(logits, target, mixed.target, mixed.share, log_prior, adjustment)
