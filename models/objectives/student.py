"""Student objective: all loss terms of Sec. 3.3."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from models.contrast.gml import ContrastLosses, TextCentres, contrast_losses, queries_with_keys
from models.contrast.queues import ClassQueues
from models.contrast.terms import ContrastInputs
from models.distributed import gather_batch, rank_count, sum_over_ranks
from models.losses.class_loss import ClassLoss, Mixed
from models.losses.distillation import distillation_loss
from models.networks.autocast import without_autocast
from models.networks.cosine_classifier import ImageClassifier
from models.networks.projection_head import ProjectionHead
from models.objectives.accumulation import WholeBatch, share_of_batch
from models.objectives.objective import Objective
from models.objectives.student_weights import ContrastEncoder, StudentWeights
from models.prior import adjust_logits


class StudentObjective(Objective):
    """gamma·L_cls + beta·(L_GML + L_tau) + alpha·L_KD on three views (classifier, query, key); one view if beta is 0.

    The contrast encoder stores its features of the key view in the class-wise queues *before* the loss is computed, so
    the keys of a query always include its own image. The key head embeds the whole queue at every step. L_tau is L_GML
    with detached similarities and without the query's own image: it has a gradient with respect to log tau_g only (from
    the official code).

    contrast_encoder `teacher`: the frozen teacher; the key head is trained through the keys (Sec. 3.3). `momentum`:
    "GML without teacher" of Table 5, an exponential moving average of the student's backbone, updated with
    `encoder_momentum` after every step (He et al. 2020). Its key head is an average of the query head and gets no
    gradient, as in the official code. The batch is not reordered here; the official code stores features under the
    label of another image. The encoder's batch norm uses the batch statistics of the key view (in the official code: of
    classifier and key view together), because running statistics do not fit weights that lag a thousand steps behind.

    text: a second term of weight beta on the query view, with its own heads and temperature. It is not one mixture with the
    queues, where a class with 200 rows of images would give its 3 sentences 1.5 % of the weight.
    """

    fused_contrast: bool | Literal["auto"] = "auto"  # see contrast_losses
    views: int
    log_prior: Tensor

    def __init__(
        self,
        model: ImageClassifier,
        teacher: ImageClassifier | None,
        log_prior: Tensor,
        counts: Sequence[int],
        weights: StudentWeights,
        *,
        tau_g: float,
        train_tau_g: bool,
        queue_total: int,
        queue_minimum: int,
        projection_dim: int,
        projection_hidden: int | None = None,
        contrast_encoder: ContrastEncoder = "teacher",
        encoder_momentum: float = 0.999,
        teacher_adjustment: float | None = None,
        loss: ClassLoss | None = None,
        text: TextCentres | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Create the heads, the queues and, if needed, the momentum encoder; a teacher that no term needs is not stored.

        projection_hidden: hidden units of the projection heads; None: the feature width. teacher_adjustment:
        strength of the logit adjustment in the teacher's L_cls; None: that of the student. If the two differ, L_KD adds the
        difference times log_prior to the teacher's logits, so that L_KD and L_cls have the same minimum. loss: L_cls; None:
        cross-entropy with the adjustment of the weights. Raises ValueError when a loss term needs a teacher and there is none.
        """
        super().__init__()
        if not (weights.gamma or weights.alpha):
            model.classifier.requires_grad_(False)
        self.model = model
        self.weights = weights
        self.teacher_excess = 0.0 if teacher_adjustment is None else teacher_adjustment - weights.adjustment
        self.views = 3 if weights.beta else 1
        self.register_buffer("log_prior", log_prior)
        self.loss = ClassLoss(log_prior, weights.adjustment) if loss is None else loss
        self.teacher: ImageClassifier | None = None
        if weights.needs_teacher(contrast_encoder):
            if teacher is None:
                raise ValueError("teacher is None, but L_KD (alpha > 0) or contrast_encoder `teacher` needs one")
            self.teacher = teacher.requires_grad_(False).eval()
        self.momentum_encoder: nn.Module | None = None
        self.text: TextCentres | None = None
        if not weights.beta:
            return
        self.query_head = ProjectionHead(model.feature_dim, projection_hidden or model.feature_dim, projection_dim)
        # The key head starts as a copy of the query head, unless the teacher has another feature width.
        stored = model if contrast_encoder == "momentum" or teacher is None else teacher
        width = stored.feature_dim
        if width == model.feature_dim:
            self.key_head = copy.deepcopy(self.query_head)
        else:
            self.key_head = ProjectionHead(width, projection_hidden or width, projection_dim)
        if contrast_encoder == "momentum":
            self.momentum_encoder = copy.deepcopy(model.backbone).requires_grad_(False)
            self.key_head.requires_grad_(False)
            self._follow = get_ema_multi_avg_fn(encoder_momentum)
        self.log_tau_g = nn.Parameter(torch.tensor(tau_g).log(), requires_grad=train_tau_g)
        self.queues = ClassQueues(counts, queue_total, queue_minimum, width, generator)
        self.text = text

    def train(self, mode: bool = True) -> StudentObjective:
        """Set training mode for all modules except the frozen teacher, whose batch norm uses its running statistics."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def batch_modules(self) -> list[nn.Module]:
        """Modules whose input is this rank's share of the batch; their batch norm must be synchronised over the ranks.

        The key head is not among them, because its input on every rank is the whole queue.
        """
        if not self.weights.beta:
            return [self.model]
        text = [] if self.text is None else self.text.batch_modules()
        return [self.model, self.query_head, *text, *([] if self.momentum_encoder is None else [self.momentum_encoder])]

    def undecayed(self) -> list[nn.Parameter]:
        """Parameters without weight decay: log tau_g (as in the official code), and what L_cls names."""
        named = self.loss.undecayed(self.model.classifier) if self.model.cosine else []
        text = [] if self.text is None else self.text.undecayed()
        return [*([self.log_tau_g] if self.weights.beta else []), *text, *named]

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Set the class weights of the epoch."""
        self.loss.begin_epoch(epoch, epochs)

    @torch.no_grad()
    def after_step(self) -> None:
        """Update the momentum encoder and its key head from the student. Nothing is copied to the host."""
        if self.momentum_encoder is not None:
            followers = [*self.momentum_encoder.parameters(), *self.key_head.parameters()]
            followed = [*self.model.backbone.parameters(), *self.query_head.parameters()]
            self._follow(followers, followed, None)

    def observations(self) -> dict[str, float]:
        """Further values for the record of an epoch: the share of the queues that holds features of training images."""
        return {"queue_fill": self.queues.fill().item()} if self.weights.beta else {}

    def whole_batch(self, views: Iterable[Tensor], target: Tensor, sample_ids: Tensor) -> WholeBatch | None:
        """Store the contrast features of a whole batch, given as micro-batches of views [V,b,3,H,W]; embed the queue once.

        views, target and sample_ids are this rank's share of the batch. Returns None if beta is 0.
        """
        if not self.weights.beta:
            return None
        features = torch.cat([self._contrast_features(part[2]) for part in views])
        self._enqueue(features, target, sample_ids)
        with_keys = queries_with_keys(self.queues, target, sample_ids, self.queues.sample_ids)
        batch = len(target) * rank_count()
        return WholeBatch.of(self.key_head(self.queues.features), batch, sum_over_ranks(with_keys))

    def forward(
        self,
        views: Tensor,
        target: Tensor,
        sample_ids: Tensor,
        mixed: Mixed | None = None,
        whole: WholeBatch | None = None,
    ) -> dict[str, Tensor]:
        """views [V,B,3,H,W] (classifier, query, key; or classifier only), target [B], sample_ids [B] → named scalar tensors.

        The first entry is `loss`. Every term whose weight is not 0 has an entry. whole: the result of `whole_batch`.
        """
        batch, weights = target.shape[0], self.weights
        # One forward pass over both views, so that batch norm uses the statistics of all 2B images.
        features, logits = self.model(torch.cat([views[0], views[1]]) if weights.beta else views[0])
        logits = logits[:batch]
        contrast_features, teacher_logits = self._encode(views, whole is None)
        parts, terms = {}, []
        if weights.gamma:
            parts["classification"] = self.loss(logits, target, mixed)
            terms.append(weights.gamma * parts["classification"])
        if weights.beta:
            if contrast_features is not None:
                self._enqueue(contrast_features, target, sample_ids)
            contrast = self._contrast(features[batch:], target, sample_ids, whole)
            parts["gml"] = contrast.gml
            terms.append(weights.beta * contrast.gml)
            if self.log_tau_g.requires_grad:
                parts["tau"] = contrast.tau
                terms.append(weights.beta * contrast.tau)
                parts["queries_without_keys"] = contrast.queries_without_keys
            if self.text is not None:
                text = self.text(ContrastInputs(features[None, batch:], target, sample_ids))
                terms.append(weights.beta * text.pop("loss"))
                parts |= {f"text_{name}": value for name, value in text.items()}
        if teacher_logits is not None:
            if self.teacher_excess:
                teacher_logits = adjust_logits(teacher_logits, self.log_prior, self.teacher_excess)
            parts["distillation"] = distillation_loss(logits, teacher_logits, weights.distillation_temperature)
            terms.append(weights.alpha * parts["distillation"])
        if weights.beta:
            parts["tau_g"] = self.log_tau_g.exp()
        return {"loss": sum(terms[1:], terms[0]), **{name: part.detach() for name, part in parts.items()}}

    def _enqueue(self, features: Tensor, target: Tensor, sample_ids: Tensor) -> None:
        # Every rank stores the whole batch in rank order, so that the queues stay equal without a broadcast.
        self.queues.enqueue(*map(gather_batch, (features, target, sample_ids)))

    @torch.no_grad()
    def _contrast_features(self, key_view: Tensor) -> Tensor:
        """Features of the contrast encoder: [B,3,H,W] → [B,D]."""
        if self.momentum_encoder is not None:
            features: Tensor = self.momentum_encoder(key_view)
        elif self.teacher is not None:
            features, _ = self.teacher(key_view)
        else:
            raise RuntimeError("no contrast encoder; beta is 0")
        return features

    @torch.no_grad()
    def _encode(self, views: Tensor, stores: bool) -> tuple[Tensor | None, Tensor | None]:
        """Contrast features [B,D] of the key view if this pass stores them, and teacher logits [B,C] of the classifier view.

        Either is None if no term needs it. The teacher processes all its views in one batch.
        """
        batch, stores = views.shape[1], stores and self.weights.beta > 0
        features = logits = None
        if stores and self.momentum_encoder is not None:
            features, stores = self._contrast_features(views[2]), False
        teacher_views = [views[index] for index, needed in ((0, self.weights.alpha > 0), (2, stores)) if needed]
        if teacher_views and self.teacher is not None:
            encoded, classified = self.teacher(torch.cat(teacher_views))
            features = encoded[-batch:] if stores else features
            logits = classified[:batch] if self.weights.alpha else None
        return features, logits

    def _contrast(
        self, query_features: Tensor, target: Tensor, sample_ids: Tensor, whole: WholeBatch | None
    ) -> ContrastLosses:
        query = self.query_head(query_features)
        keys = self.key_head(self.queues.features) if whole is None else whole.keys
        with without_autocast(query):
            similarity = query @ keys.T
        losses = contrast_losses(
            similarity,
            self.queues,
            target,
            self.log_prior,
            self.log_tau_g.exp(),
            self.weights.prior_strength,
            query_ids=sample_ids,
            key_ids=self.queues.sample_ids,
            fused=self.fused_contrast,
        )
        queries, ranks = len(target), rank_count()
        if whole is not None:
            return share_of_batch(losses, queries, whole.batch, whole.with_keys)
        if ranks == 1:
            return losses
        with_keys = sum_over_ranks(queries - losses.queries_without_keys)
        return share_of_batch(losses, queries, queries * ranks, with_keys)
