"""Construction of the loss of a student with several experts, and checks of its params before any training."""

from __future__ import annotations

import math

import torch

from models.experts.backbone import SplitError, expert_backbone
from models.losses.class_loss import ClassLoss
from models.objectives.experts import ExpertsLoss, Ncl, Reslt, Ride, Sade
from pipeline.data.class_prior import Prior
from pipeline.params import StudentParams
from pipeline.params.experts import ExpertsParams, NclParams, ResltParams, RideParams
from pipeline.shared.errors import ParamsError


def experts_loss(section: ExpertsParams, prior: Prior, loss: ClassLoss) -> ExpertsLoss:
    """The loss of student.experts. loss: student.loss, used by RIDE."""
    log_prior = torch.tensor(prior.in_losses)
    if isinstance(section, RideParams):
        return Ride(loss, section.reweight, section.diversity)
    if isinstance(section, NclParams):
        hard_classes = max(2, round(section.hard_share * len(prior.classes)))
        return Ncl(log_prior + math.log(sum(prior.counts)), hard_classes, section.divergence)
    if isinstance(section, ResltParams):
        return Reslt(torch.tensor(prior.counts), section.leave_out, section.beta)
    return Sade(log_prior, section.strength)


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
