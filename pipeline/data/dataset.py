"""Images of a split for training and evaluation: one uint8 tensor in memory, or a stream if it is too large."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.distributed import mean_over_ranks
from models.preprocess import ImageError, decode, preprocess, resize
from pipeline.augment import Draws, cuts_originals
from pipeline.data.split_tables import count_rows, read_split
from pipeline.data.stream import ImageStream
from pipeline.params import AugmentParams, DataParams, ImageParams, Params
from pipeline.shared.artifacts import SPLIT
from pipeline.shared.errors import DataError
from pipeline.shared.host_memory import free_bytes
from pipeline.sources import ImageReader, in_parts, open_source, reading_order

SHARE = 0.5  # of free memory that a decoded split may take; larger splits are streamed


@dataclass(frozen=True)
class Images:
    """A decoded split: images uint8 [N,3,H,W]; labels int64 [N]; N sample_ids; N references to images in the source.

    source: None for rows that were generated, which have no files.
    """

    images: Tensor
    labels: Tensor
    sample_ids: list[str]
    references: list[str]
    source: ImageReader | None

    def __len__(self) -> int:
        return len(self.sample_ids)

    def encoded(self, index: int) -> bytes:
        """The original bytes of one image."""
        assert self.source is not None
        return self.source.read(self.references[index])

    def order(self, generator: torch.Generator) -> Tensor:
        """The indices of an epoch in random order, int64 [N], from a CPU generator."""
        return torch.randperm(len(self), generator=generator)

    def pixels(self, chosen: Tensor) -> Tensor:
        """Pixels uint8 [B,3,H,W] of the images at indices `chosen` int64 [B]."""
        return self.images[chosen]

    def batches(self, chosen: Tensor, size: int) -> Iterator[Tensor]:
        """`pixels` of the indices `chosen` in order, `size` at a time."""
        return map(self.pixels, chosen.split(size))

    def feed(
        self,
        indices: Tensor,  # noqa: ARG002 - same signature as ImageStream
        draws: Iterable[Draws] | None = None,  # noqa: ARG002 - same signature as ImageStream
    ) -> AbstractContextManager[Iterator[None]]:
        """Context with an iterator of None for the batches of indices int64 [steps,B]; the step has the images."""
        return nullcontext(itertools.repeat(None))

    def epoch_record(self, seconds: float) -> dict[str, float]:  # noqa: ARG002 - same signature as ImageStream
        """Empty: no step waits for data and no image is replaced."""
        return {}

    def replaced(self) -> None:
        """Returns None: no image is replaced, because all were decoded before training."""

    def warning(self) -> None:
        """Returns None: all orders are equally likely."""


AnyImages = Images | ImageStream


class OtherSizeError(Exception):
    """An image is not a square of image.size pixels."""


def training_images(
    params: Params,
    device: torch.device,
    folder: Path = SPLIT,
    *,
    augment: AugmentParams | None = None,
    views: int = 1,
    free_memory: Callable[[], int] = free_bytes,
) -> tuple[AnyImages, AnyImages, str | None]:
    """Load the training and the validation split, in memory or as streams; also returns why they are streamed, or None.

    augment, views: of the params section that trains. free_memory: free bytes of the host. A resized crop is cut from
    the original image. Training images are then read by a stream that keeps as many originals in memory as stream.mode
    allows, unless all are squares of image.size, which the device can crop. If one rank must stream, all ranks stream.
    Raises as `load_images` does.
    """
    rows = sum(count_rows(split, folder) for split in ("train", "validation"))
    data, image, settings = params.data, params.image, params.stream
    streamed, reason = should_stream(params, rows, device, free_memory())
    # Free memory differs between processes, and processes with different decisions would wait for one another forever.
    if mean_over_ranks(torch.tensor(float(streamed), device=device)).item() > 0 and not streamed:
        streamed = True
        reason = "reads images as it needs them: another process has too little memory for all (stream.mode: auto)"
    originals = augment is not None and cuts_originals(views, augment)
    if not streamed:
        validation: AnyImages = load_images(data, image, "validation", folder)
        with contextlib.suppress(OtherSizeError):
            return load_images(data, image, "train", folder, reject_other_sizes=originals), validation, None
    else:
        validation = ImageStream(data, image, settings, "validation", device, folder)
    hold = {"on": 0.0, "off": math.inf, "auto": SHARE * free_memory()}[settings.mode] if originals else 0.0
    train = ImageStream(
        data, image, settings, "train", device, folder,
        replace_bad=data.on_bad_image == "skip", augment=augment if originals else None, hold=hold,
    )  # fmt: skip
    return train, validation, "; ".join(filter(None, [reason, train.warning()])) or None


def evaluation_images(params: Params, split: str, folder: Path = SPLIT) -> AnyImages:
    """Load a split with the pixels that the server uses, on the CPU: in memory, or a stream. Raises as `load_images` does."""
    data, image, cpu = params.data, params.image, torch.device("cpu")
    if should_stream(params, count_rows(split, folder), cpu, free_bytes())[0]:
        return ImageStream(data, image, params.stream, split, cpu, folder, exactly=True)
    return load_images(data, image, split, folder)


def should_stream(params: Params, rows: int, device: torch.device, free_memory: int) -> tuple[bool, str | None]:
    """Whether `rows` decoded images are streamed, and the reason if stream.mode is auto. free_memory: bytes of the host."""
    if params.stream.mode != "auto":
        return params.stream.mode == "on", None
    needed = rows * 3 * params.image.size**2
    free_in = {"in memory": free_memory, **free_on_gpu(device)}
    for where, free in free_in.items():
        if needed > SHARE * free:
            return True, (
                f"reads images as it needs them: decoded they take {needed / 1e9:.1f} GB, above half of the "
                f"{free / 1e9:.1f} GB free {where} (stream.mode: auto)"
            )
    return False, None


def free_on_gpu(device: torch.device) -> dict[str, int]:
    """Free bytes of a GPU by the words that name it; empty for the CPU."""
    if device.type == "cpu":
        return {}
    torch.cuda.empty_cache()  # what PyTorch keeps for reuse is free too
    return {f"on {device}": torch.cuda.mem_get_info(device)[0]}


def load_images(
    data: DataParams, image: ImageParams, split: str, folder: Path = SPLIT, *, reject_other_sizes: bool = False
) -> Images:
    """Decode and resize every image of a split into memory.

    reject_other_sizes: do not resize; raises OtherSizeError for the first image that is not a square of image.size. Raises
    ParamsError when the split does not exist, DataError that names a bad file.
    """
    table = read_split(split, ["sample_id", "label", "reference"], folder)
    source = open_source(data)
    references = table.column("reference").to_pylist()
    size, resize_to = image.size, image.resize_to
    stacked = np.empty((len(references), 3, size, size), dtype=np.uint8)

    def square(encoded: bytes) -> np.ndarray:
        decoded = decode(encoded)
        if decoded.size != (size, size):
            raise OtherSizeError
        return resize(decoded, size, size)

    def prepared(encoded: bytes) -> np.ndarray:
        return preprocess(encoded, size, resize_to, interpolation=image.interpolation)

    def load(indices: Sequence[int]) -> None:
        for index in indices:
            encoded = source.read(references[index])
            try:
                stacked[index] = square(encoded) if reject_other_sizes else prepared(encoded)
            except ImageError as error:
                raise DataError(f"{references[index]}: {error}; replace the image and run `dvc repro` again") from None

    # Read in the order of the source, so that each row group of a table is read once.
    with ThreadPoolExecutor() as pool:
        list(pool.map(load, in_parts(reading_order(references), 64)))
    labels = torch.from_numpy(table.column("label").to_numpy().astype(np.int64))
    return Images(torch.from_numpy(stacked), labels, table.column("sample_id").to_pylist(), references, source)


def normalise(images: Tensor, params: ImageParams) -> Tensor:
    """Normalise uint8 [..., 3,H,W] to the network's input: float32 (x/255 - mean) / std per channel."""
    return Normalisation(params, images.device)(images)


class Normalisation:
    """`normalise` with its constants already on the device, so that a step copies nothing to it."""

    def __init__(self, params: ImageParams, device: torch.device) -> None:
        self._mean = torch.tensor(params.mean, device=device).view(3, 1, 1)
        self._std = torch.tensor(params.std, device=device).view(3, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [..., 3,H,W] on the device → float32, same shape. Features, which are floats, are returned unchanged."""
        if images.is_floating_point():
            return images.float()
        return (images.float() / 255 - self._mean) / self._std
