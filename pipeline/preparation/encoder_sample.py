"""`tailor init`: compute features of a sample of images; measure five-fold kNN accuracy and the encoder's speed."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.preprocess import ImageError
from pipeline.data.profiles import class_members
from pipeline.data.stream_decoding import decode_exact
from pipeline.data.stream_order import default_workers
from pipeline.evaluation.intervals import Estimate, weighted_accuracy
from pipeline.features.compute import BATCH
from pipeline.model_io.encoder import LoadedEncoder
from pipeline.params import EncoderParams, ImageParams
from pipeline.shared.errors import DataError
from pipeline.sources import Row, Source
from serving.shared.terminal import counted

IMAGES, FEWEST_OF_A_CLASS, SECONDS = 400, 4, 10.0  # limits of a sample; forward passes stop after SECONDS
FOLDS, NEIGHBOURS, TEMPERATURE = 5, 10, 0.07


@dataclass(frozen=True)
class SampleResult:
    """Result of a sample: mean per-class accuracy of kNN with its 95 % interval, and the speed.

    images, classes: numbers of the sample. of_classes: number of classes in the folder. accuracy: NO_ESTIMATE if no class
    has two images. images_per_second: speed of decoding and encoder together.
    """

    images: int
    classes: int
    of_classes: int
    accuracy: Estimate
    images_per_second: float

    @property
    def above_chance(self) -> bool:
        """Whether the interval of the accuracy excludes chance, 1 / classes."""
        return self.accuracy.low is not None and self.accuracy.low > 1 / self.classes

    def __str__(self) -> str:
        accuracy, of = self.accuracy, f" of {self.of_classes:,}" if self.classes < self.of_classes else ""
        if accuracy.value is None:
            return "no class of the sample has two images, so no accuracy can be estimated"
        value, low, high = (100 * value for value in (accuracy.value, accuracy.low, accuracy.high))
        return (
            f"five-fold kNN on {counted(self.images, 'image')} of {counted(self.classes, 'class')}{of}: mean per-class "
            f"accuracy {value:.0f} %, 95 % interval {low:.0f} to {high:.0f}"
        )


def measure_sample(source: Source, encoder: LoadedEncoder, image: ImageParams, device: torch.device) -> SampleResult:
    """Compute the features of a stratified sample of the training images, at most IMAGES in about SECONDS seconds.

    Unreadable images are skipped. Of identical files only the first is used, because kNN would find the copy of an image
    in another fold. Raises DataError if no image can be read.
    """
    rows = stratified_sample([row for row in source.rows if row.split == "train"], len(source.classes))
    features, labels, speed = _features(source, rows, encoder, image, device)
    _, numbered = np.unique(labels, return_inverse=True)
    accuracy = knn_accuracy(features, numbered)
    return SampleResult(len(labels), int(numbered.max()) + 1, len(source.classes), accuracy, speed)


def stratified_sample(rows: list[Row], classes: int, seed: int = 0) -> list[Row]:
    """Draw at most IMAGES rows, the same number from each class as far as possible. Any first part is stratified too.

    With more than IMAGES / FEWEST_OF_A_CLASS classes, classes are drawn at random: kNN needs several images per class.
    """
    generator = np.random.default_rng(seed)
    members = [generator.permutation(own) for own in class_members(np.array([row.label for row in rows]), classes)]
    chosen = generator.permutation(classes)[: IMAGES // FEWEST_OF_A_CLASS]
    turns = max(len(members[label]) for label in chosen)
    dealt = (members[label][turn] for turn in range(turns) for label in chosen if turn < len(members[label]))
    return [rows[index] for index, _ in zip(dealt, range(IMAGES), strict=False)]


def _features(
    source: Source, rows: list[Row], encoder: LoadedEncoder, image: ImageParams, device: torch.device
) -> tuple[Tensor, np.ndarray, float]:
    """Compute features float32 [n,D] and labels [n], and measure images/s."""
    encoder.network.to(device, memory_format=torch.channels_last)

    def compute(pixels: Tensor) -> Tensor:
        hashes = np.zeros((len(pixels), 32), np.uint8)  # only augmented views use the hashes
        return encoder.features(pixels.to(device), hashes, image, EncoderParams(name="sample"))[:, 0].float()

    compute(torch.zeros(1, 3, image.size, image.size, dtype=torch.uint8))  # the first pass allocates memory
    features: list[Tensor] = []
    labels: list[int] = []
    started = time.perf_counter()
    with ThreadPoolExecutor(default_workers()) as pool:
        decoded = pool.map(lambda row: _decoded(source, row, image), rows)
        for part, pixels in _batches(rows, decoded, BATCH[device.type]):
            features.append(compute(pixels))
            labels += [row.label for row in part]
            if time.perf_counter() - started > SECONDS:
                pool.shutdown(wait=False, cancel_futures=True)
                break
    if not labels:
        raise DataError(f"{source.origin}: none of {counted(len(rows), 'sampled image')} can be read")
    return torch.cat(features), np.array(labels), len(labels) / (time.perf_counter() - started)


def _decoded(source: Source, row: Row, image: ImageParams) -> tuple[bytes, Tensor] | None:
    """Return the sha256 of the file and its pixels; None if it cannot be read."""
    try:
        encoded = source.read(row.reference)
        return hashlib.sha256(encoded).digest(), decode_exact(encoded, image)
    except (DataError, ImageError):
        return None


def _batches(
    rows: list[Row], decoded: Iterator[tuple[bytes, Tensor] | None], size: int
) -> Iterator[tuple[list[Row], Tensor]]:
    """Yield the readable images in batches, without copies of a file. The last batch may be smaller."""
    distinct = _distinct(rows, decoded)
    while part := list(itertools.islice(distinct, size)):
        yield [row for row, _ in part], torch.stack([pixels for _, pixels in part])


def _distinct(rows: list[Row], decoded: Iterator[tuple[bytes, Tensor] | None]) -> Iterator[tuple[Row, Tensor]]:
    seen: set[bytes] = set()
    for row, image in zip(rows, decoded, strict=True):
        if image and image[0] not in seen:
            seen.add(image[0])
            yield row, image[1]


def knn_accuracy(features: Tensor, labels: np.ndarray, seed: int = 0) -> Estimate:
    """Estimate the mean per-class accuracy of cosine kNN in FOLDS folds, with the interval of `weighted_accuracy`.

    features: float [N,D]; labels: int [N], 0..C-1. Each image is classified by its NEIGHBOURS nearest images of the other
    folds, weighted by exp(cosine / TEMPERATURE); source: Wu et al. 2018, Unsupervised Feature Learning via Non-Parametric
    Instance Discrimination. The folds are stratified. Classes with one image are left out.
    """
    classes = int(labels.max()) + 1
    fold, generator = np.zeros(len(labels), np.int64), np.random.default_rng(seed)
    for members in class_members(labels, classes):
        fold[generator.permutation(members)] = np.arange(len(members)) % FOLDS
    unit = torch.nn.functional.normalize(features, dim=1)
    cosine = unit @ unit.T
    same = torch.from_numpy(fold[:, None] == fold)
    nearest = cosine.masked_fill(same, -torch.inf).topk(min(NEIGHBOURS, len(labels)), dim=1)
    votes = torch.zeros(len(labels), classes)
    votes.scatter_add_(1, torch.from_numpy(labels)[nearest.indices], (nearest.values / TEMPERATURE).exp())
    correct = votes.argmax(1).numpy() == labels
    tested = np.bincount(labels, minlength=classes)
    tested[tested < 2] = 0
    return weighted_accuracy(np.bincount(labels[correct], minlength=classes), tested, np.ones(classes))
