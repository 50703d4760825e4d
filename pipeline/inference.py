"""A trained network's answers for a split."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from models.cosine_classifier import ImageClassifier
from models.ranks import rank, rank_count
from pipeline.dataset import AnyImages, normalise
from pipeline.params import ImageParams

EVALUATION_BATCH = 512


@torch.inference_mode()
def outputs(
    model: ImageClassifier, images: Tensor | Iterable[Tensor], image: ImageParams, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Features [N,D] and logits [N,C] (cosine / tau_s, no prior) of uint8 images [N,3,H,W], float32 on the CPU, eval mode.

    images may also come in batches [b,3,H,W], one after another.
    """
    was_training = model.training
    model.eval()
    features, logits = [], []
    for batch in images.split(EVALUATION_BATCH) if isinstance(images, Tensor) else images:
        feature, logit = model(normalise(batch.to(device), image))
        features.append(feature.float().cpu())
        logits.append(logit.float().cpu())
    model.train(was_training)
    return torch.cat(features), torch.cat(logits)


def balanced_logits(
    model: ImageClassifier,
    images: Tensor | Iterable[Tensor],
    image: ImageParams,
    device: torch.device,
    shift: np.ndarray | None = None,
) -> Tensor:
    """Logits [N,C] for the balanced target prior, float32 on the CPU. images: as in `outputs`; shift: Prior.balanced_shift."""
    logits = outputs(model, images, image, device)[1]
    return logits if shift is None else logits + torch.from_numpy(shift).to(logits.dtype)


def accuracy(
    model: ImageClassifier,
    data: AnyImages,
    image: ImageParams,
    device: torch.device,
    shift: np.ndarray | None = None,
) -> float:
    """Share of a split that the answer for the balanced prior gets right. Each image is evaluated once, by one rank."""
    mine = torch.arange(rank(), len(data), rank_count())
    right = torch.zeros(1, dtype=torch.float64)
    if len(mine):
        logits = balanced_logits(model, data.batches(mine, EVALUATION_BATCH), image, device, shift)
        right += (logits.argmax(1) == data.labels[mine]).sum()
    if rank_count() > 1:
        right = right.to(device)
        dist.all_reduce(right)
    return right.item() / len(data)
