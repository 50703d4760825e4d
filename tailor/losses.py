"""Losses and the modules that they need in a training loop: log prior, queues, heads. Needs PyTorch (extra `train`)."""

from models.contrast.gml import contrast_losses
from models.contrast.gml_reference import gml_loss, other_sample_mask
from models.contrast.queues import ClassQueues
from models.losses.adjusted_cross_entropy import adjusted_cross_entropy, mixed_cross_entropy
from models.losses.distillation import distillation_loss
from models.networks.cosine_classifier import CosineClassifier, ImageClassifier
from models.networks.projection_head import ProjectionHead
from models.prior import balanced_shift, log_class_prior

__all__ = [
    "ClassQueues",
    "CosineClassifier",
    "ImageClassifier",
    "ProjectionHead",
    "adjusted_cross_entropy",
    "balanced_shift",
    "contrast_losses",
    "distillation_loss",
    "gml_loss",
    "log_class_prior",
    "mixed_cross_entropy",
    "other_sample_mask",
]
