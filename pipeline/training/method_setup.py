"""Construction of L_cls and of the objective of experts from params, and checks of experts before any training."""

from __future__ import annotations

import math

import torch

from models.experts.backbone import SplitError, expert_backbone
from models.losses.class_loss import (
    ClassLoss,
    FocalLoss,
    LADELoss,
    LDAMLoss,
    SigmoidFocalLoss,
    SmoothingLoss,
    Weighting,
)
from models.networks.cosine_classifier import ImageClassifier
from models.objectives.experts import BbnObjective, ExpertsObjective, Ncl, Reslt, Ride, Sade
from pipeline.data.class_prior import Prior
from pipeline.params import StudentParams, TrainingParams, method
from pipeline.params.experts import BbnParams, ExpertsParams, NclParams, ResltParams, RideParams
from pipeline.shared.errors import ParamsError


def class_loss(section: TrainingParams, prior: Prior) -> ClassLoss:
    """L_cls of a section, in float32 on the CPU."""
    loss, strength, log_prior = section.loss, section.adjustment, torch.tensor(prior.in_losses)
    if isinstance(loss, method.LADELoss):
        return LADELoss(log_prior, strength, loss.weight, loss.regulariser)
    weighting = None
    if loss.class_balance is not None:
        weighting = Weighting(prior.counts, loss.class_balance, loss.after, loss.average)
    if isinstance(loss, method.FocalLoss):
        return FocalLoss(log_prior, strength, loss.gamma, weighting)
    if isinstance(loss, method.SigmoidFocalLoss):
        return SigmoidFocalLoss(log_prior, loss.gamma, weighting)
    if isinstance(loss, method.LDAMLoss):
        return LDAMLoss(log_prior, strength, prior.counts, 1 / section.tau_s, loss.margin, weighting)
    if isinstance(loss, method.SmoothingLoss):
        return SmoothingLoss(log_prior, strength, prior.counts, loss.head, loss.tail, weighting)
    return ClassLoss(log_prior, strength, weighting)


def experts_objective(
    section: ExpertsParams, prior: Prior, model: ImageClassifier, loss: ClassLoss
) -> ExpertsObjective | BbnObjective:
    """The objective of student.experts for a network with an ExpertBackbone. loss: student.loss, used by RIDE."""
    if isinstance(section, BbnParams):
        return BbnObjective(model, section.power)
    log_prior = torch.tensor(prior.in_losses)
    if isinstance(section, RideParams):
        return ExpertsObjective(model, Ride(loss, section.reweight, section.diversity))
    if isinstance(section, NclParams):
        hard_classes = max(2, round(section.hard_share * len(prior.classes)))
        log_counts = log_prior + math.log(sum(prior.counts))
        return ExpertsObjective(model, Ncl(log_counts, hard_classes, section.divergence))
    if isinstance(section, ResltParams):
        return ExpertsObjective(model, Reslt(torch.tensor(prior.counts), section.leave_out, section.beta))
    return ExpertsObjective(model, Sade(log_prior, section.strength))


def check_experts(student: StudentParams, prior: Prior) -> None:
    """Raise ParamsError when student.backbone cannot be split, or student.experts does not fit the number of classes."""
    section, classes = student.experts, len(prior.classes)
    if section is None:
        return
    try:
        with torch.device("meta"):
            expert_backbone(student.backbone, 1, section.shared, section.narrow)
    except SplitError as error:
        raise ParamsError(f"student.backbone: {error}, or student.experts.kind: ncl") from None
    if isinstance(section, ResltParams) and round(section.leave_out[1] * classes) >= classes:
        raise ParamsError(
            f"student.experts.leave_out is {section.leave_out}, which leaves no class of {classes} to the third branch; "
            "lower the second share"
        )
