"""Label-aware smoothing of MiSLAS (Zhong et al., CVPR 2021, Eq. 2 to 5)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def smoothing_of_classes(counts: Tensor, head: float, tail: float) -> Tensor:
    """Smoothing of each class: tail + (head - tail)·sin(pi/2·(n_c - n_min)/(n_max - n_min)), the concave form: [C].

    counts: [C] training images. head, tail: of the class with the most and with the fewest images. Classes of one size
    have `tail`.
    """
    n = counts.double()
    spread = n.max() - n.min()
    share = (n - n.min()) / spread if spread > 0 else torch.zeros_like(n)
    return tail + (head - tail) * torch.sin(math.pi / 2 * share)


def label_aware_smoothing(logits: Tensor, target: Tensor, smoothing: Tensor) -> Tensor:
    """Mean over the batch of (1 - e_y)·CE + e_y·mean_c(-log p_c): a scalar.

    logits: [B,C]; target: [B] int64; smoothing: [C], e of each class.
    """
    log_p = F.log_softmax(logits, dim=1)
    share = smoothing[target]
    own = -log_p.gather(1, target[:, None])[:, 0]
    return ((1 - share) * own - share * log_p.mean(1)).mean()
