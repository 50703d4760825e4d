"""Objective of the student with a contrast term of another paper (models/contrast/terms.py) in the place of the GML loss."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from models.contrast.terms import ContrastInputs, ContrastTerm
from models.losses.class_loss import ClassLoss, Mixed
from models.losses.distillation import distillation_loss
from models.networks.cosine_classifier import ImageClassifier
from models.objectives.objective import Objective
from models.objectives.student_weights import StudentWeights
from models.prior import adjust_logits


class ContrastObjective(Objective):
    """gamma·L_cls + beta·term + alpha·L_KD.

    Views: the classifier view, unless the term's queries start with it; the query views; for a momentum encoder, the key
    view. The student runs on classifier and query views in one pass, so that its batch norm uses all of them. The frozen
    teacher runs on the classifier view: for L_KD, for a term whose key it gives, or for both.
    """

    log_prior: Tensor

    def __init__(
        self,
        model: ImageClassifier,
        teacher: ImageClassifier | None,
        log_prior: Tensor,
        weights: StudentWeights,
        term: ContrastTerm,
        *,
        encoder_momentum: float = 0.999,
        teacher_adjustment: float | None = None,
        loss: ClassLoss | None = None,
    ) -> None:
        """teacher_adjustment, loss: as in StudentObjective.

        A classifier that no term trains is frozen, for a second stage that fits another one. Raises ValueError when L_KD or
        the term needs a teacher and there is none.
        """
        super().__init__()
        self.model, self.weights, self.term = model, weights, term
        self.teacher_excess = 0.0 if teacher_adjustment is None else teacher_adjustment - weights.adjustment
        self.register_buffer("log_prior", log_prior, persistent=False)  # a constant, which a term may share
        self.loss = ClassLoss(log_prior, weights.adjustment) if loss is None else loss
        self.first = 0 if term.on_classifier_view else 1
        self.views = self.first + term.views + (term.encoder == "momentum")
        self.teacher: ImageClassifier | None = None
        if weights.needs_teacher(term.encoder):
            if teacher is None:
                raise ValueError(f"teacher is None, but L_KD (alpha > 0) or {type(term).__name__} needs one")
            self.teacher = teacher.requires_grad_(False).eval()
        self.momentum_encoder: nn.Module | None = None
        if term.encoder == "momentum":
            self.momentum_encoder = copy.deepcopy(model.backbone).requires_grad_(False)
            self._follow = get_ema_multi_avg_fn(encoder_momentum)
        if not (weights.gamma or weights.alpha or {"logits", "class_weight"} & set(term.uses)):
            model.classifier.requires_grad_(False)

    def train(self, mode: bool = True) -> ContrastObjective:
        """Set training mode for all modules except the frozen teacher, whose batch norm uses its running statistics."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def batch_modules(self) -> list[nn.Module]:
        """See Objective."""
        encoder = [] if self.momentum_encoder is None else [self.momentum_encoder]
        return [self.model, *self.term.batch_modules(), *encoder]

    def undecayed(self) -> list[nn.Parameter]:
        """Parameters without weight decay: those of the term and of L_cls."""
        return [*self.term.undecayed(), *(self.loss.undecayed(self.model.classifier) if self.model.cosine else [])]

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Set the class weights and the memory of the term."""
        self.loss.begin_epoch(epoch, epochs)
        self.term.begin_epoch(epoch, epochs)

    @torch.no_grad()
    def after_step(self) -> None:
        """Store the features of the step; update the momentum encoder and the heads that follow it."""
        self.term.after_step()
        if self.momentum_encoder is not None:
            pairs = [(self.momentum_encoder, self.model.backbone), *self.term.momentum_pairs()]
            followers, followed = ([p for pair in pairs for p in pair[side].parameters()] for side in (0, 1))
            self._follow(followers, followed, None)

    def forward(
        self,
        views: Tensor,
        target: Tensor,
        sample_ids: Tensor,
        mixed: Mixed | None = None,
        whole: None = None,  # noqa: ARG002 - the interface of Objective
    ) -> dict[str, Tensor]:
        """views [V,B,3,H,W], target [B], sample_ids [B] → named scalar tensors; the first entry is `loss`."""
        weights, students = self.weights, self.first + self.term.views
        features, logits = self.model(views[:students].flatten(0, 1))
        features, logits = (values.unflatten(0, (students, len(target))) for values in (features, logits))
        key, teacher_logits = self._references(views)
        parts, terms = {}, []
        if weights.gamma:
            parts["classification"] = self.classification(features[0], logits[0], target, mixed)
            terms.append(weights.gamma * parts["classification"])
        inputs = ContrastInputs(
            features[self.first :], target, sample_ids, key, logits[self.first :], self.model.classifier.weight
        )
        contrast, *observed = self.term(inputs).items()
        parts["contrast"] = contrast[1]
        terms.append(weights.beta * contrast[1])
        if teacher_logits is not None and weights.alpha:
            parts["distillation"] = distillation_loss(logits[0], teacher_logits, weights.distillation_temperature)
            terms.append(weights.alpha * parts["distillation"])
        parts.update(observed)
        return {"loss": sum(terms[1:], terms[0]), **{name: part.detach() for name, part in parts.items()}}

    def classification(self, features: Tensor, logits: Tensor, target: Tensor, mixed: Mixed | None) -> Tensor:  # noqa: ARG002
        """L_cls, a scalar. features [B,D], logits [B,C] of the classifier view; target [B]."""
        loss: Tensor = self.loss(logits, target, mixed)
        return loss

    @torch.no_grad()
    def _references(self, views: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Key features [B,E] and the teacher's logits [B,C] of the classifier view; None where no term needs them."""
        key = self.momentum_encoder(views[-1]) if self.momentum_encoder is not None else None
        if self.teacher is None:
            return key, None
        features, logits = self.teacher(views[0])
        if self.teacher_excess:
            logits = adjust_logits(logits, self.log_prior, self.teacher_excess)
        return (features if self.term.encoder == "teacher" else key), logits
