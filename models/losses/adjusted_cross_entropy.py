"""Cross-entropy with logit adjustment, for one target and for mixed targets."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from models.prior import adjust_logits


def adjusted_cross_entropy(logits: Tensor, target: Tensor, log_prior: Tensor, strength: float = 1.0) -> Tensor:
    """L_cls, Eq. 6: cross-entropy of logits + strength * log_prior, mean over the batch.

    logits: [B,C], already divided by tau_s; target: [B] int64; log_prior: [C]. Returns a scalar.
    """
    return F.cross_entropy(adjust_logits(logits, log_prior, strength), target)


def mixed_cross_entropy(
    logits: Tensor, target: Tensor, other: Tensor, share: Tensor, log_prior: Tensor, strength: float = 1.0
) -> Tensor:
    """L_cls of two images mixed (CutMix, Mixup): share · CE(target) + (1 - share) · CE(other), mean over the batch.

    logits: [B,C], already divided by tau_s; target, other: [B] int64; share: [B] in 0..1; log_prior: [C]. Returns a
    scalar.
    """
    adjusted = adjust_logits(logits, log_prior, strength)
    own = F.cross_entropy(adjusted, target, reduction="none")
    partners = F.cross_entropy(adjusted, other, reduction="none")
    return (share * own + (1 - share) * partners).mean()
