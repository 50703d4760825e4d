"""The losses and what they need in a training loop: log prior, queues, heads. Needs PyTorch, `tailor[train]`."""

from models.contrast_losses import contrast_losses
from models.cosine_classifier import CosineClassifier, ImageClassifier
from models.losses import adjusted_cross_entropy, distillation_loss, gml_loss, mixed_cross_entropy, other_sample_mask
from models.prior import balanced_shift, log_class_prior
from models.projection_head import ProjectionHead
from models.queues import ClassQueues

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
