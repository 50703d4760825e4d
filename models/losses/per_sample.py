"""Classification losses as pure functions of logits [B,C] and labels [B]: one loss per sample, in the dtype of the logits.

`ClassLoss` of class_loss.py weights and averages them. Where a loss has a logit adjustment, the logits contain it already.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.distributed import gather_batch, gather_with_gradient
from models.prior import Floats, effective_number


def class_balanced_weights(counts: Any, beta: float) -> Floats:
    """Weights of the classes, 1 / effective number with the sum C (Cui et al. 2019): float64 [C].

    counts: [C] training images; a class without images has the weight of one image. beta: above 0 and below 1.
    """
    weights: Floats = 1 / effective_number([max(count, 1) for count in counts], beta)
    weights *= len(weights) / weights.sum()
    return weights


def focal_losses(logits: Tensor, target: Tensor, gamma: float) -> Tensor:
    """(1 - p)^gamma · CE with p the softmax probability of the label (Lin et al. 2017): [B].

    1 - p is a log-sum-exp over the other classes, so that loss and gradient are finite where p rounds to 1.
    """
    log_rest = logits.scatter(1, target[:, None], -torch.inf).logsumexp(1) - logits.logsumexp(1)
    return (gamma * log_rest).exp() * F.cross_entropy(logits, target, reduction="none")


def sigmoid_focal_losses(logits: Tensor, target: Tensor, gamma: float) -> Tensor:
    """Focal loss of C binary classifiers: sum_c (1 - q_c)^gamma · BCE_c, q_c = sigmoid(z_c) of the label, else 1 - it: [B].

    The loss of Cui et al. 2019 before their class weights. Its authors start the bias of the last layer at -log(C - 1).
    """
    signed = torch.where(F.one_hot(target, logits.shape[1]).bool(), logits, -logits)
    return ((-gamma * F.softplus(signed)).exp() * F.softplus(-signed)).sum(1)


def class_margins(counts: Any, largest: float = 0.5) -> Tensor:
    """Margins of LDAM, largest · (n_min / n_c)^(1/4) (Cao et al. 2019, Eq. 11): float64 [C]; 0 images count as 1."""
    n = torch.tensor([max(count, 1) for count in counts], dtype=torch.float64)
    return largest * (n.min() / n) ** 0.25


def margin_losses(logits: Tensor, target: Tensor, margins: Tensor) -> Tensor:
    """Cross-entropy after the label's margin is subtracted from its logit (LDAM): [B]. margins: [C], in units of the logits."""
    return F.cross_entropy(logits - margins * F.one_hot(target, logits.shape[1]), target, reduction="none")


def smoothing_of_classes(counts: Tensor, head: float, tail: float) -> Tensor:
    """Smoothing of each class: tail + (head - tail)·sin(pi/2·(n_c - n_min)/(n_max - n_min)), the concave form: [C].

    MiSLAS, Zhong et al., CVPR 2021, Eq. 5. counts: [C] training images. head, tail: of the class with the most and with the
    fewest images. Classes of one size have `tail`.
    """
    n = counts.double()
    spread = n.max() - n.min()
    share = torch.where(spread > 0, (n - n.min()) / spread, 0.0)  # no `if`: counts may have no data (fake tensors)
    return tail + (head - tail) * torch.sin(math.pi / 2 * share)


def smoothed_losses(logits: Tensor, target: Tensor, smoothing: Tensor) -> Tensor:
    """(1 - e_y)·CE + e_y·mean_c(-log p_c): [B]. smoothing: [C], e of each class; equal entries are plain label smoothing."""
    log_p = F.log_softmax(logits, dim=1)
    share = smoothing[target]
    own = -log_p.gather(1, target[:, None])[:, 0]
    return (1 - share) * own - share * log_p.mean(1)


def lade_penalty(logits: Tensor, target: Tensor, log_prior: Tensor, strength: float) -> Tensor:
    """Regulariser R of LADE (Hong et al., CVPR 2021, Eq. 11) of the batch of all ranks: a scalar.

    logits: [B,C] without a prior; log_prior: [C]; strength: lambda. R = -sum_c p_c (v_c - lambda s_c^2), with s_c the log of
    the mean of exp(z_c) / (C p_c) over the batch and v_c the mean logit of the images of class c minus s_c; a class without
    an image in the batch has the mean 0. 1e-9 is added to both priors and 1e-8 to the counts, as in the official code.
    """
    every, labels = gather_with_gradient(logits), gather_batch(target)
    batch, classes = every.shape
    prior = log_prior.exp()
    s = (every - (prior + 1e-9).log() + math.log(1 / classes + 1e-9)).logsumexp(0) - math.log(batch)
    member = F.one_hot(labels, classes).to(every.dtype)
    v = (member * every).sum(0) / (member.sum(0) + 1e-8) - s
    return -(prior * (v - strength * s.square())).sum()
