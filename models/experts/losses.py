"""Losses of several experts on their logits [B,E,C]: RIDE, SADE, NCL and ResLT, as pure functions; and BBN's.

Means are over this rank's share of the batch, so that their mean over the ranks is that of the whole batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.distributed import mean_over_ranks
from models.prior import adjust_logits


def losses_of_experts(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of each image and expert: logits [B,E,C], target [B] int64 → [B,E]."""
    experts = logits.shape[1]
    return F.cross_entropy(logits.transpose(1, 2), target[:, None].expand(-1, experts), reduction="none")


def diversity_temperatures(prior: Tensor, factor: float) -> Tensor:
    """RIDE's temperature of each class after the switch: (C * prior * v + 1 - v) / maximum, [C]; factor: v."""
    temperatures = len(prior) * prior * factor + 1 - factor
    return temperatures / temperatures.max()


def ride_diversity(logits: Tensor, temperature: Tensor) -> Tensor:
    """Diversity of RIDE (Wang et al., ICLR 2021), a scalar: T² * KL(mean of the experts || expert), summed over the experts.

    logits: [B,E,C]; temperature: [C], ones before the switch and `diversity_temperatures` after it; T is their mean. The
    mean of the experts has no gradient.
    """
    mean = F.log_softmax(logits.detach().mean(1, keepdim=True) / temperature, dim=2)
    divergence = (mean.exp() * (mean - F.log_softmax(logits / temperature, dim=2))).sum((1, 2))
    return temperature.mean().square() * divergence.mean()


def reversed_log_prior(log_prior: Tensor) -> Tensor:
    """Log prior of the class of opposite rank, [C]: the rarest class gets the log prior of the most frequent one."""
    ordered, classes = log_prior.sort(stable=True)
    return torch.empty_like(log_prior).scatter(0, classes, ordered.flip(0))


def sade_loss(logits: Tensor, target: Tensor, log_prior: Tensor, strength: float) -> Tensor:
    """SADE (Zhang et al., NeurIPS 2022): three experts for the training prior, a balanced and a reversed prior, summed.

    Cross-entropy of z_1, of z_2 + η and of z_3 + η - τ * (reversed η), with η = log_prior [C] and τ = strength. logits:
    [B,3,C]; target: [B] int64.
    """
    reverse = log_prior - strength * reversed_log_prior(log_prior)
    shifts = torch.stack([torch.zeros_like(log_prior), log_prior, reverse])
    return losses_of_experts(adjust_logits(logits, shifts, 1.0), target).mean(0).sum()


def mutual_divergence(logits: Tensor) -> Tensor:
    """Sum of KL(p_j || p_k) over all ordered pairs of experts, over E - 1; mean over the batch. logits: [B,E,C]."""
    log_p = F.log_softmax(logits, dim=2)
    p = log_p.exp()
    # Sum over k != j of p_j (log p_j - log p_k); the term k = j is 0.
    pairs = log_p.shape[1] * (p * log_p).sum((1, 2)) - (p.sum(1) * log_p.sum(1)).sum(1)
    return pairs.mean() / (log_p.shape[1] - 1)


def ncl_loss(logits: Tensor, target: Tensor, log_counts: Tensor, hard_classes: int, divergence: float) -> Tensor:
    """NCL (Li et al., CVPR 2022): logit-adjusted cross-entropy of each expert, and the experts' divergences from each other.

    Both once over all classes and once over the own class and the classes with the highest logits of the first expert,
    `hard_classes` in all. Logits of other classes are 0 there, not -inf (authors' code). Both divergences have a
    gradient through both experts, and the weight `divergence`. logits: [B,E,C]; target: [B] int64; log_counts: [C], log
    of the number of training images of each class (of the prior it would give another loss, because of the zeros).
    """
    first = logits[:, 0].detach().scatter(1, target[:, None], torch.inf)
    mask = torch.zeros_like(first).scatter(1, first.topk(hard_classes, dim=1).indices, 1.0)
    adjusted = adjust_logits(logits, log_counts, 1.0)
    parts = [
        losses_of_experts(each, target).mean(0).sum() + divergence * mutual_divergence(each)
        for each in (adjusted, adjusted * mask[:, None])
    ]
    return parts[0] + parts[1]


def reslt_groups(counts: Tensor, shares: tuple[float, float]) -> Tensor:
    """Which classes each of ResLT's experts learns, float [3,C]: all; all but the largest classes; the smallest classes.

    counts: [C], images of each class. shares: shares of the classes, from the largest, that the second and the third
    expert leave out: .35 and .7 for CIFAR-100 in the authors' code.
    """
    classes = len(counts)
    rank = torch.empty_like(counts).scatter(
        0, counts.argsort(descending=True, stable=True), torch.arange(classes, dtype=counts.dtype)
    )
    starts = torch.tensor([0, *(round(share * classes) for share in shares)])
    return (rank >= starts[:, None]).float()


def reslt_loss(logits: Tensor, target: Tensor, groups: Tensor, beta: float) -> Tensor:
    """ResLT (Cui et al., TPAMI 2022): beta * independent losses of the experts + (1 - beta) * loss of their sum.

    The independent loss is the mean over all pairs of image and expert whose group has the image's class. logits:
    [B,3,C]; target: [B] int64; groups: [3,C], see `reslt_groups`.
    """
    learned = groups[:, target].T
    independent = (losses_of_experts(logits, target) * learned).mean() / mean_over_ranks(learned.mean())
    return beta * independent + (1 - beta) * F.cross_entropy(logits.sum(1), target)


def bbn_features(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """Feature of BBN in training: 2 * [share * first; (1 - share) * second], [B,2D]; of equal shares it is [first; second].

    first, second: [B,D], of images of the two batches; share: scalar.
    """
    return 2 * torch.cat([share * first, (1 - share) * second], 1)


def bbn_loss(logits: Tensor, target: Tensor, second_target: Tensor, share: Tensor) -> Tensor:
    """Loss of BBN: share * CE(label of the first batch) + (1 - share) * CE(label of the second), a scalar. logits: [B,C]."""
    return share * F.cross_entropy(logits, target) + (1 - share) * F.cross_entropy(logits, second_target)
