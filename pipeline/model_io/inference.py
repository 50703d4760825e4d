"""Inference of a trained network on a split: features, logits, accuracy, class-activation maps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from models.decisions import activation_maps
from models.distributed import rank, rank_count
from models.networks.backbones import NoFeatureMapError
from models.networks.cosine_classifier import ImageClassifier, LinearHead
from pipeline.data.dataset import AnyImages, normalise
from pipeline.params import ImageParams
from pipeline.shared.errors import StageError

EVALUATION_BATCH = 512
MAP_TOLERANCE = 1e-4  # largest difference of a value of the unit feature from the mean of the map


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
            _, logits = _outputs(model, data.batches(indices, EVALUATION_BATCH), image, device)
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


def class_rows(model: ImageClassifier) -> tuple[np.ndarray, bool] | None:
    """Matrix float32 [C,D] of which the logits are the product with the feature, without a bias; whether with the unit feature.

    None for a student with another classifier.
    """
    if model.memory is not None or not model.cosine:
        return None
    if isinstance(head := model.classifier, LinearHead):
        plain = head.centre is None and head.gate_weight is None
        return (head.weight.detach().cpu().numpy().astype(np.float32), True) if plain else None
    folded = model.folded()
    if folded is None or folded.parts > 1:
        return None
    return folded.matrix.cpu().numpy().astype(np.float32), folded.parts == 1


def is_mean(unit: np.ndarray, cells: np.ndarray) -> bool:
    """Whether features of length 1 [n,D] have the direction of the mean over the positions of their map [n,D,h,w]."""
    mean = cells.mean(axis=(2, 3), dtype=np.float64)
    return bool(np.abs(mean / np.linalg.norm(mean, axis=1, keepdims=True) - unit).max() <= MAP_TOLERANCE)


@torch.inference_mode()
def class_maps(
    model: ImageClassifier, images: Tensor, chosen: np.ndarray, image: ImageParams, device: torch.device
) -> np.ndarray | None:
    """Class-activation map of class chosen[i] for uint8 image i of [n,3,H,W], float32 [n,h,w]; model in eval mode.

    None for a network without an exact map, as in a release: its classifier is not one matrix (class_rows), or its feature is
    not the mean of a map.
    """
    found = class_rows(model)
    if found is None or images.ndim != 4:  # stored features have no positions
        return None
    try:
        outputs, maps = model.backbone.with_map(normalise(images.to(device), image))
    except NoFeatureMapError:
        return None
    cells = maps.float().cpu().numpy()
    if not is_mean(torch.nn.functional.normalize(outputs.float(), dim=1).cpu().numpy(), cells):
        return None
    return activation_maps(found[0], cells, chosen, found[1])
