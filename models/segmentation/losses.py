"""L_cls on pixels (Eq. 6 with the strength α of Eq. 10) and its two averages."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from models.distributed import mean_over_ranks
from models.prior import adjust_logits
from models.segmentation.network import upsample

IGNORED = 255  # label of a pixel without a class
Average = Literal["valid", "official"]


def pixel_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    log_prior: Tensor,
    strength: float = 1.0,
    *,
    ignored: int = IGNORED,
    average: Average = "valid",
) -> Tensor:
    """L_cls: cross-entropy of upsampled logits + strength * log_prior at every pixel with a class. Returns a scalar.

    logits: [B,C,h,w] float, already divided by tau_s; labels: [B,H,W], any integer dtype, a class or `ignored`;
    log_prior: [C]. The sum over the pixels with a class is divided by their number (`valid`), or by the number of all
    pixels, as in mmsegmentation (`official`). With several ranks the number is the mean over the ranks, so that the mean
    of the losses is that of the whole batch. Without any valid pixel the loss is 0.
    """
    adjusted = adjust_logits(logits, log_prior[:, None, None], strength)
    pixels = upsample(adjusted, *labels.shape[1:])
    total = F.cross_entropy(pixels, labels.long(), ignore_index=ignored, reduction="sum")
    if average == "official":
        return total / labels.numel()
    return total / mean_over_ranks((labels != ignored).sum().to(total.dtype)).clamp(min=1)
