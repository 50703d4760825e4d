"""The second stages that train: linear classifier, cRT, balanced softmax, LWS, MiSLAS, LOS, DisAlign, BALMS and MetaSAug.

Each takes the features of the training images and, except `train_linear`, the head to start from; it returns a new head. The
recipes are those of the papers and their code. They train on features of length NORM, so that a head's weight is NORM times
the trained one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from models.losses.per_sample import smoothed_losses, smoothing_of_classes
from models.networks.cosine_classifier import LinearHead, gated_logits, linear_head
from models.prior import adjust_logits
from models.second_stage import disalign
from models.second_stage.fitting import NORM, Fit, Head, Recipe, TrainingFeatures, fit, length_of, rate_of
from models.second_stage.meta_sampler import MetaSampler
from models.second_stage.metasaug import MetaSAug

RECIPES = {
    "linear": Recipe(30, 512, 0.2, 5e-4),
    "crt": Recipe(10, 512, 0.2, 5e-4, balanced=True),
    "balanced_softmax": Recipe(30, 512, 0.2, 5e-4),
    "lws": Recipe(5, 512, 0.2, 5e-4, balanced=True),
    "mislas": Recipe(10, 128, 0.1, 5e-4, balanced=True),
    "disalign": Recipe(10, 256, 0.1, 5e-4),
    "los": Recipe(20, 64, 5e-3),  # 5e-4 in the paper, with 100 classes
    "balms": Recipe(10, 512, 0.2, 5e-4, balanced=True),
    "metasaug": Recipe(20, 128, 5e-3),  # 3e-4 in its code, with more steps
}
# Learning rate of the values of a class alone (scale, gain, offset), as a multiple of the recipe's: the papers have 1 and up to
# five times as many steps; with 1, they are far from their optimum after LEAST_STEPS.
SCALE_RATE = 10.0
MISLAS_RATE = 0.2  # learning rate of the classifier, as a multiple of that of the scales
LOS_SMOOTHING = 0.98
LOS_CHECKS = 100


def train_linear(data: TrainingFeatures, how: Fit, log_prior: Tensor | None = None) -> LinearHead:
    """Linear classifier with bias by cross-entropy, from zeros.

    With a balanced recipe it is classifier re-training, cRT (Kang et al., ICLR 2020, section 4.1). With a plain one it is
    the classifier of a first stage with cross-entropy, from which tau-normalisation starts. log_prior: [C], added to the
    logits in the loss (L_cls, balanced softmax); None: nothing. The problem is convex; the papers start from random weights.
    """
    weight = torch.zeros(data.classes, data.features.shape[2], device=how.device)
    bias = torch.zeros(data.classes, device=how.device)
    added = torch.zeros_like(bias) if log_prior is None else log_prior.float().to(how.device)

    def loss(features: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(adjust_logits(F.linear(features, weight, bias), added, 1.0), target)

    fit([(weight, 1), (bias, 1)], loss, data, how)
    return linear_head(NORM * weight, bias)


def train_lws(start: LinearHead, data: TrainingFeatures, how: Fit) -> LinearHead:
    """Learnable weight scaling: s_c·(W_c·x + b_c), of which only s is trained, from 1 (Kang et al., ICLR 2020, Eq. 5)."""
    weight, bias = _starting(start, how.device)
    scale = torch.ones(data.classes, device=how.device)

    def loss(features: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(scaled_logits(F.linear(features, weight, bias), scale), target)

    fit([(scale, SCALE_RATE)], loss, data, how)
    return linear_head(NORM * scale[:, None] * weight, scale * bias)


def scaled_logits(logits: Tensor, scale: Tensor) -> Tensor:
    """Logits [B,C] times one scale per class [C]."""
    return logits * scale


def train_mislas(
    start: LinearHead,
    data: TrainingFeatures,
    how: Fit,
    smoothing: tuple[float, float],
) -> LinearHead:
    """MiSLAS: classifier and LWS scales by label-aware smoothing (Zhong et al., CVPR 2021, section 3.2).

    smoothing: of the class with the most and with the fewest training images.
    """
    weight, bias = _starting(start, how.device)
    scale = torch.ones(data.classes, device=how.device)
    counts = torch.bincount(data.labels, minlength=data.classes)
    amounts = smoothing_of_classes(counts, *smoothing).float().to(how.device)

    def loss(features: Tensor, target: Tensor) -> Tensor:
        return smoothed_losses(scaled_logits(F.linear(features, weight, bias), scale), target, amounts).mean()

    fit([(weight, MISLAS_RATE), (bias, MISLAS_RATE), (scale, 1)], loss, data, how)
    return linear_head(NORM * scale[:, None] * weight, scale * bias)


def train_los(
    start: LinearHead, data: TrainingFeatures, how: Fit, score: Callable[[LinearHead], float] | None = None
) -> LinearHead:
    """Label over-smoothing: cross-entropy with a label smoothing of 0.98 (Sun et al., ICLR 2025). Needs no class counts.

    score: rates a head on held-out images; the best head of LOS_CHECKS moments of the training is returned. The classes are
    balanced on the way and not at the optimum of the loss, so that the authors' code keeps its best epoch, on the test images.
    None: the last head.
    """
    weight, bias = _starting(start, how.device)
    every = max(1, length_of(how.recipe, len(data.labels)).total // LOS_CHECKS)
    best: tuple[float, LinearHead] | None = None

    def loss(features: Tensor, target: Tensor) -> Tensor:
        return over_smoothed_cross_entropy(F.linear(features, weight, bias), target)

    def watch(step: int, steps: int, batch: int) -> None:
        nonlocal best
        if how.watch:
            how.watch(step, steps, batch)
        if score and step % every == 0:
            head = linear_head(NORM * weight, bias)
            value = score(head)
            if best is None or value > best[0]:
                best = value, head

    fit([(weight, 1), (bias, 1)], loss, data, replace(how, watch=watch))
    return best[1] if best else linear_head(NORM * weight, bias)


def over_smoothed_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy against .02 at the label plus .98 / C at each class. logits: [B,C]; target: [B] int64."""
    return F.cross_entropy(logits, target, label_smoothing=LOS_SMOOTHING)


def train_disalign(start: LinearHead, data: TrainingFeatures, how: Fit, log_prior: Tensor) -> LinearHead:
    """DisAlign: gate, gain and offset of each class by weighted cross-entropy; see `disalign`. log_prior: [C].

    The gate has the feature of length 1: at the length of the papers' features, it starts saturated.
    """
    weight, bias = _starting(start, how.device)
    gain = torch.full((data.classes,), disalign.GAIN, device=how.device)
    offset = torch.zeros(data.classes, device=how.device)
    gate, gate_bias = (
        torch.full((weight.shape[1],), disalign.GATE, device=how.device),
        torch.zeros(1, device=how.device),
    )
    weights = disalign.class_weights(log_prior).float().to(how.device)

    def loss(features: Tensor, target: Tensor) -> Tensor:
        logits = gated_logits(F.linear(features, weight, bias), features / NORM, gate, gate_bias, gain, offset)
        return disalign.weighted_cross_entropy(logits, target, weights)

    fit([(tensor, SCALE_RATE) for tensor in (gain, offset, gate, gate_bias)], loss, data, how)
    head = LinearHead(weight.shape[1], data.classes, gated=True)
    values = {
        "weight": NORM * weight, "bias": bias, "gate_weight": gate, "gate_bias": gate_bias, "gain": gain,
        "offset": offset,
    }  # fmt: skip
    head.load_state_dict({name: value.cpu() for name, value in values.items()})
    return head.eval().requires_grad_(False)


def train_balms(start: LinearHead, data: TrainingFeatures, how: Fit, log_prior: Tensor) -> LinearHead:
    """BALMS: balanced softmax on batches whose class shares are learned; see `meta_sampler`. log_prior: [C]."""
    weight, bias = _starting(start, how.device)
    rate = rate_of(how.recipe, data.classes)
    loss = MetaSampler(Head(weight, bias), data, log_prior.float().to(how.device), rate, how.seed)
    fit([(weight, 1), (bias, 1)], loss, data, how)
    return linear_head(NORM * weight, bias)


def train_metasaug(start: LinearHead, data: TrainingFeatures, how: Fit) -> LinearHead:
    """MetaSAug: weighted cross-entropy with implicit augmentation of the features; see `metasaug`."""
    weight, bias = _starting(start, how.device)
    steps, rate = length_of(how.recipe, len(data.labels)).total, rate_of(how.recipe, data.classes)
    fit([(weight, 1), (bias, 1)], MetaSAug(Head(weight, bias), data, rate, steps, how.seed), data, how)
    return linear_head(NORM * weight, bias)


def _starting(start: LinearHead, device: torch.device) -> tuple[Tensor, Tensor]:
    """Copies of weight and bias for features of length NORM."""
    return start.weight.detach().clone().to(device) / NORM, start.bias.detach().clone().to(device)
