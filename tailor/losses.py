"""Losses and the modules that they need in a training loop: log prior, queues, heads. Needs PyTorch (extra `train`)."""

from models.contrast.crd import CRD
from models.contrast.gml import contrast_losses
from models.contrast.gml_reference import gml_loss, other_sample_mask
from models.contrast.kcl import KPositiveContrast, TargetedContrast
from models.contrast.memories import FifoQueue
from models.contrast.paco import GPaCo, PaCo
from models.contrast.proco import ProCo
from models.contrast.queues import ClassQueues
from models.contrast.supcon import BalancedContrast, SupCon
from models.contrast.terms import ContrastInputs
from models.experts.backbone import expert_backbone
from models.experts.losses import ncl_loss, reslt_groups, reslt_loss, ride_diversity, sade_loss
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
from models.objectives.experts import expert_logits
from models.prior import balanced_shift, log_class_prior

__all__ = [
    "CRD",
    "BalancedContrast",
    "CausalClassifier",
    "ClassLoss",
    "ClassQueues",
    "ContrastInputs",
    "CosineClassifier",
    "FifoQueue",
    "FocalLoss",
    "GPaCo",
    "ImageClassifier",
    "KPositiveContrast",
    "LADELoss",
    "LDAMLoss",
    "LinearClassifier",
    "Mixed",
    "PaCo",
    "ProCo",
    "ProjectionHead",
    "SigmoidFocalLoss",
    "SmoothingLoss",
    "SupCon",
    "TargetedContrast",
    "Weighting",
    "adjusted_cross_entropy",
    "balanced_shift",
    "contrast_losses",
    "distillation_loss",
    "expert_backbone",
    "expert_logits",
    "gml_loss",
    "log_class_prior",
    "mixed_cross_entropy",
    "ncl_loss",
    "other_sample_mask",
    "reslt_groups",
    "reslt_loss",
    "ride_diversity",
    "sade_loss",
]
