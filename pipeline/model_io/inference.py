"""Inference of a trained network on a split: features, logits, accuracy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from models.distributed import rank, rank_count
from models.networks.cosine_classifier import ImageClassifier
from pipeline.data.dataset import AnyImages, normalise
from pipeline.params import ImageParams
from pipeline.shared.errors import StageError

EVALUATION_BATCH = 512
EVALUATION_PIXELS = 128 * 224**2  # of a batch on a GPU; by an estimate 1.5 GB of activations of a ResNet-50


class NotFiniteError(StageError):
    """A network returns logits that are not finite; the message counts the images, and `divergence_named` adds the folder."""

    def __init__(self, bad: int, images: int) -> None:
        super().__init__(f"its logits are not finite for {bad:,} of {images:,} images")


@contextlib.contextmanager
def divergence_named(folder: Path, stage: str) -> Iterator[None]:
    """Context manager: a NotFiniteError becomes a StageError with the network's folder, the rate to lower, and the stage."""
    try:
        yield
    except NotFiniteError as error:
        raise StageError(
            f"{folder}: {error}: training diverged; lower {stage}.learning_rate and run `dvc repro -f {stage}`"
        ) from None


def check_finite(logits: np.ndarray) -> np.ndarray:
    """Return logits [N,C] unchanged. Raises NotFiniteError, because argmax would select NaN."""
    bad = int((~np.isfinite(logits).all(axis=1)).sum())
    if bad:
        raise NotFiniteError(bad, len(logits))
    return logits


@torch.inference_mode()
def outputs(
    model: ImageClassifier, images: Tensor | Iterable[Tensor], image: ImageParams, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Features [N,D] and logits [N,C] (cosine / tau_s, no prior) of uint8 images [N,3,H,W]; float32, CPU, eval mode.

    images: a tensor or an iterable of batches [b,3,H,W]. Raises NotFiniteError for a logit that is not finite.
    """
    feature, logit = _outputs(model, images, image, device)
    check_finite(logit.numpy())
    return feature, logit


def _outputs(
    model: ImageClassifier, images: Tensor | Iterable[Tensor], image: ImageParams, device: torch.device
) -> tuple[Tensor, Tensor]:
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
    """Logits [N,C] for the balanced target prior, float32 on the CPU.

    images: as in `outputs`; shift: Prior.balanced_shift. Raises NotFiniteError as `outputs` does.
    """
    logits = outputs(model, images, image, device)[1]
    return logits if shift is None else logits + torch.from_numpy(shift).to(logits.dtype)


def evaluation_batch(device: torch.device, size: int) -> int:
    """Images of `size` pixels in a batch of a validation, which has to fit beside the training's memory on a GPU."""
    return EVALUATION_BATCH if device.type == "cpu" else max(1, min(EVALUATION_BATCH, EVALUATION_PIXELS // size**2))


def accuracy(
    model: ImageClassifier, data: AnyImages, image: ImageParams, device: torch.device, shift: np.ndarray | None = None
) -> float:
    """Accuracy on a split with the balanced prior. Each image is evaluated once, by one rank.

    shift: as in `balanced_logits`. Raises NotFiniteError on every rank when any rank has a logit that is not finite.
    """
    indices = torch.arange(rank(), len(data), rank_count())
    counts = torch.zeros(2, dtype=torch.float64)  # correct predictions, and images with logits that are not finite
    if len(indices):
        with torch.inference_mode():
            _, logits = _outputs(model, data.batches(indices, evaluation_batch(device, image.size)), image, device)
        shifted = logits if shift is None else logits + torch.from_numpy(shift).to(logits.dtype)
        counts[0] += (shifted.argmax(1) == data.labels[indices]).sum()
        counts[1] += (~logits.isfinite().all(1)).sum()
    if rank_count() > 1:
        counts = counts.to(device)
        dist.all_reduce(counts)
    right, bad = counts.tolist()
    if bad:
        raise NotFiniteError(int(bad), len(data))
    return right / len(data)
