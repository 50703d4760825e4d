"""Construction of L_cls from params."""

from __future__ import annotations

import torch

from models.losses.class_loss import (
    ClassLoss,
    FocalLoss,
    LADELoss,
    LDAMLoss,
    SigmoidFocalLoss,
    SmoothingLoss,
    Weighting,
)
from pipeline.data.class_prior import Prior
from pipeline.params import TrainingParams, method


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
