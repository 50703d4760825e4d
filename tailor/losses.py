"""Losses and the modules that they need in a training loop: log prior, queues, heads. Needs PyTorch (extra `train`)."""

from models.contrast.gml import contrast_losses
from models.contrast.gml_reference import gml_loss, other_sample_mask
from models.contrast.queues import ClassQueues
from models.losses.adjusted_cross_entropy import adjusted_cross_entropy, mixed_cross_entropy
from models.losses.class_loss import (
    ClassLoss,
    FocalLoss,
    LADELoss,
    LDAMLoss,
    Mixed,
    SigmoidFocalLoss,
    SmoothingLoss,
    Weighting,
)
from models.losses.distillation import distillation_loss
from models.networks.cosine_classifier import CausalClassifier, CosineClassifier, ImageClassifier, LinearClassifier
from models.networks.projection_head import ProjectionHead
from models.prior import balanced_shift, log_class_prior

__all__ = [
    "CausalClassifier",
    "ClassLoss",
    "ClassQueues",
    "CosineClassifier",
    "FocalLoss",
    "ImageClassifier",
    "LADELoss",
    "LDAMLoss",
    "LinearClassifier",
    "Mixed",
    "ProjectionHead",
    "SigmoidFocalLoss",
    "SmoothingLoss",
    "Weighting",
    "adjusted_cross_entropy",
    "balanced_shift",
    "contrast_losses",
    "distillation_loss",
    "gml_loss",
    "log_class_prior",
    "mixed_cross_entropy",
    "other_sample_mask",
]
