"""Class maps of a trained segmentation network on a split: logits at the images' own size, areas, mIoU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from models.distributed import rank, rank_count
from models.prior import adjust_logits
from models.segmentation.metrics import Areas
from models.segmentation.network import SegmentationModel, upsample
from pipeline.data.dataset import normalise
from pipeline.model_io.inference import NotFiniteError
from pipeline.params import ImageParams
from pipeline.segmentation.dataset import LabelMapSplit

BATCH = 8
MAX_LOGITS = 2**27


def image_logits(logits: Tensor, canvas: tuple[int, int], inside: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Logits [S,C,h,w] of a canvas → [S,C,*size] of the image: without the padding, at its own size.

    inside: height and width that the image takes in the canvas. Where the image was not resized, this is what the served
    graph computes.
    """
    full = upsample(logits, *canvas)[:, :, : inside[0], : inside[1]]
    return full if inside == size else upsample(full, *size)


@torch.inference_mode()
def cell_logits(
    model: SegmentationModel, data: LabelMapSplit, indices: Sequence[int], image: ImageParams, device: torch.device
) -> Iterator[tuple[Tensor, tuple[int, int], np.ndarray]]:
    """Yield the logits [C,h,w] of each image without any prior, its size in the canvas, and its label map; eval mode."""
    was_training = model.training
    model.eval()
    for batch in data.batches(list(indices), BATCH):
        logits = model(normalise(batch.images.to(device), image)).logits.float()
        yield from zip(logits, batch.inside, batch.label_maps, strict=True)
    model.train(was_training)


def class_maps(
    logits: Tensor, adjustments: Tensor, canvas: tuple[int, int], inside: tuple[int, int], size: tuple[int, int]
) -> np.ndarray:
    """Class maps uint8 [S,h,w] of one image for several adjustments [S,C], which are added to its logits [C,h,w].

    Computed for a few adjustments at a time, so that the logits of all pixels take at most MAX_LOGITS numbers.
    """
    pixels = len(logits) * max(canvas[0] * canvas[1], size[0] * size[1])
    maps = []
    for part in adjustments.to(logits).split(max(1, MAX_LOGITS // pixels)):
        adjusted = adjust_logits(logits[None], part[:, :, None, None], 1.0)
        maps.append(image_logits(adjusted, canvas, inside, size).argmax(1).to(torch.uint8).cpu())
    return torch.cat(maps).numpy()


@torch.inference_mode()
def areas_by_adjustment(
    model: SegmentationModel, data: LabelMapSplit, image: ImageParams, device: torch.device, adjustments: np.ndarray
) -> tuple[list[Areas], list[list[Areas]]]:
    """Areas of the split for each row of adjustments [S,C], and those of each image, [N][S].

    Raises NotFiniteError for logits that are not finite.
    """
    added, bad = torch.from_numpy(adjustments).float().to(device), 0
    totals = [Areas.zero(adjustments.shape[1]) for _ in adjustments]
    images = []
    for logits, inside, labels in cell_logits(model, data, range(len(data)), image, device):
        bad += not bool(logits.isfinite().all())
        predicted = class_maps(logits, added, data.canvas, inside, labels.shape)
        own = [Areas.zero(adjustments.shape[1]) for _ in adjustments]
        for total, mine, prediction in zip(totals, own, predicted, strict=True):
            mine.add(prediction, labels)
            total.intersection += mine.intersection
            total.predicted += mine.predicted
            total.labelled += mine.labelled
        images.append(own)
    if bad:
        raise NotFiniteError(bad, len(data))
    return totals, images


def mean_iou(
    model: SegmentationModel,
    data: LabelMapSplit,
    image: ImageParams,
    device: torch.device,
    shift: np.ndarray | None = None,
) -> float:
    """Return mIoU on a split with the balanced prior, in 0..1. Each image is evaluated once, by one rank.

    shift: [C], Prior.balanced_shift. Raises NotFiniteError on every rank when any rank has a logit that is not finite.
    """
    classes = model.classes
    added = torch.zeros(1, classes) if shift is None else torch.from_numpy(shift).float()[None]
    areas, bad = Areas.zero(classes), 0
    for logits, inside, labels in cell_logits(model, data, range(rank(), len(data), rank_count()), image, device):
        bad += not bool(logits.isfinite().all())
        areas.add(class_maps(logits, added.to(device), data.canvas, inside, labels.shape)[0], labels)
    counts = torch.from_numpy(np.concatenate([areas.intersection, areas.predicted, areas.labelled, [bad]]))
    if rank_count() > 1:
        counts = counts.to(device)
        dist.all_reduce(counts)
    *parts, failed = counts.cpu().split([classes, classes, classes, 1])
    if int(failed):
        raise NotFiniteError(int(failed), len(data))
    return Areas(*(part.numpy() for part in parts)).metrics()["miou"] or 0.0


@torch.inference_mode()
def probe_finite(model: SegmentationModel, pixels: Tensor, image: ImageParams, device: torch.device) -> Any:
    """Run training images uint8 [B,4,H,W] through the network. Raises NotFiniteError for logits that are not finite."""
    was_training = model.training
    logits = model.eval()(normalise(pixels[:, :3].to(device), image)).logits
    model.train(was_training)
    bad = int((~logits.isfinite().flatten(1).all(1)).sum())
    if bad:
        raise NotFiniteError(bad, len(pixels))
