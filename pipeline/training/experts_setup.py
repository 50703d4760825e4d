"""Construction of the objective of a student with several experts, and checks of its params before any training."""

from __future__ import annotations

import math

import torch

from models.experts.backbone import SplitError, expert_backbone
from models.losses.class_loss import ClassLoss
from models.networks.cosine_classifier import ImageClassifier
from models.objectives.experts import BbnObjective, ExpertsObjective, Ncl, Reslt, Ride, Sade
from pipeline.data.class_prior import Prior
from pipeline.params import StudentParams
from pipeline.params.experts import BbnParams, ExpertsParams, NclParams, ResltParams, RideParams
from pipeline.shared.errors import ParamsError


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
