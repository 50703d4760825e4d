"""Classification losses by name, and distillation, on the logits of images; re-exports `gml_loss` from models.contrast."""

from models.contrast.gml_reference import gml_loss, mixture_log_scores, other_sample_mask
from models.losses.adjusted_cross_entropy import adjusted_cross_entropy, mixed_cross_entropy
from models.losses.distillation import distillation_loss

__all__ = [
    "adjusted_cross_entropy",
    "distillation_loss",
    "gml_loss",
    "mixed_cross_entropy",
    "mixture_log_scores",
    "other_sample_mask",
]
