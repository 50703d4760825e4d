"""Reference implementation of the GML loss as written in the paper (Eq. 4), for tests of the fused form in gml.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.prior import adjust_logits


def mixture_log_scores(
    similarity: Tensor, row_class: Tensor, classes: int, temperature: Tensor | float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """log s_c of Eq. 4: the log-mean-exp of similarity / temperature over the keys of each class.

    similarity: [B,K] cosines; row_class: [K] int64, the class of each key; mask: [B,K] bool, True keeps the pair.
    Returns (log s [B,C], number of keys that were used [B,C]). A class without a key in a row has the score -inf there.

    The maximum is taken per class and not per row, so that a class far below the row's maximum cannot underflow to
    log 0 at any temperature (the official form underflows below a tau_g of about .019). There is no K x C one-hot
    matrix: the cost is O(BK + BC).
    """
    rows = similarity.shape[0]
    index = row_class.expand(rows, -1)
    with torch.no_grad():
        unmasked = similarity if mask is None else similarity.masked_fill(~mask, -torch.inf)
        peak = similarity.new_full((rows, classes), -torch.inf).scatter_reduce(1, index, unmasked, "amax")
        peak = peak.masked_fill(peak == -torch.inf, 0.0)
        pairs = torch.ones_like(similarity) if mask is None else mask.to(similarity.dtype)
        keys = similarity.new_zeros(rows, classes).index_add(1, row_class, pairs)
    # Subtracting before dividing keeps the exponent <= 0 at any temperature. A masked pair is set to 0 before the
    # division and its term to 0 after it: with -inf before the division, the gradient with respect to the temperature
    # would be 0 * inf.
    below_peak = similarity - peak.gather(1, index)
    if mask is not None:
        below_peak = below_peak.masked_fill(~mask, 0.0)
    terms = torch.exp(below_peak / temperature) * pairs
    sums = similarity.new_zeros(rows, classes).index_add(1, row_class, terms)
    empty = keys == 0
    mean = sums.masked_fill(empty, 1.0) / keys.clamp(min=1.0)
    scores = (peak / temperature + mean.log()).masked_fill(empty, -torch.inf)
    return scores, keys


def gml_loss(
    similarity: Tensor,
    row_class: Tensor,
    target: Tensor,
    log_prior: Tensor,
    temperature: Tensor | float,
    strength: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """L_GML, Eq. 4 (Eq. 10 if `strength`, its α, is not 1): cross-entropy of log s_c + strength * log_prior, batch mean.

    similarity: [B,K] cosines of query and contrast features; row_class: [K] int64; target: [B] int64; log_prior: [C];
    temperature: tau_g > 0, a number or a scalar tensor (differentiable). mask: [B,K] bool, True keeps the pair.

    A query whose class has no key under the mask has no likelihood and is excluded from the mean (the official code
    computes 0/0 there, and tau_g stays NaN). If all queries are excluded, the loss is 0.
    """
    scores, keys = mixture_log_scores(similarity, row_class, log_prior.shape[0], temperature, mask)
    answerable = keys.gather(1, target[:, None]).squeeze(1) > 0
    # The gradient of an excluded row would be inf - inf = NaN, so its scores are replaced before the softmax.
    scores = scores.masked_fill(~answerable[:, None], 0.0)
    losses = F.cross_entropy(adjust_logits(scores, log_prior, strength), target, reduction="none")
    weight = answerable.to(losses.dtype)
    return (losses * weight).sum() / weight.sum().clamp(min=1.0)


def other_sample_mask(query_ids: Tensor, key_ids: Tensor) -> Tensor:
    """Mask for L_tau: [B,K] bool, True where query and key are from different samples. Ids: int64 [B] and [K]."""
    return query_ids[:, None] != key_ids[None, :]
