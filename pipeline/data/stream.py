"""A split as a stream of batches, for data that do not fit in memory.

Alternative to `dataset.Images`. Memory holds a label and two strings per image, and the pixels of prefetched batches,
so the pixels in memory do not grow with the split.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.distributed import mean_over_ranks, rank_count
from models.preprocess import ImageError
from pipeline.augment import Draws, cut_boxes
from pipeline.data.split_tables import ArrowStrings, read_split
from pipeline.data.stream_decoding import (
    DecodingStream,
    crop_and_resize,
    decode_exact,
    decode_fast,
    decode_nvjpeg,
    decode_original,
    decode_unless_nvjpeg,
    enough_pixels,
    evaluation_view,
)
from pipeline.data.stream_order import (
    NvjpegImage,
    PrefetchIterator,
    default_workers,
    order_warning,
    other_images_of_class,
    shuffled_order,
)
from pipeline.params import AugmentParams, DataParams, ImageParams, StreamParams
from pipeline.shared.artifacts import SPLIT
from pipeline.shared.errors import DataError, ParamsError
from pipeline.sources import BadImageError, open_reader
from serving.shared.terminal import counted

SHOWN = 5  # replaced images named in a message
DECODERS = {"exact": decode_exact, "fast": decode_fast, "gpu": decode_unless_nvjpeg}


class ImageStream:
    """Images of one split, decoded on demand, with the methods of `dataset.Images`.

    replace_bad: an unreadable image is replaced by another of its class, counted and reported, so that batches keep
    their shape and classes their share; otherwise such an image raises DataError. exactly: use the pixels of the
    server's decoder for any stream.decode. augment: of a params section with resized crops; views are cut from the
    originals if draws are passed with the indices. hold: bytes of decoded originals that are kept in memory. hashes:
    sha256 of the encoded images, uint8 [N,32]; an image with another hash raises DataError when it is read. Raises
    ParamsError when the split does not exist or stream.decode is gpu and the device is not a GPU.
    """

    images = None

    def __init__(
        self,
        data: DataParams,
        image: ImageParams,
        settings: StreamParams,
        split: str,
        device: torch.device,
        folder: Path = SPLIT,
        *,
        replace_bad: bool = False,
        exactly: bool = False,
        augment: AugmentParams | None = None,
        hold: float = 0,
        hashes: np.ndarray | None = None,
    ) -> None:
        table = read_split(split, ["sample_id", "label", "reference"], folder)
        self.labels = torch.from_numpy(table.column("label").to_numpy().astype(np.int64))
        self.sample_ids = ArrowStrings(table.column("sample_id"))
        self.references = ArrowStrings(table.column("reference"))
        self._image, self.device, self._replace_bad, self._augment = image, device, replace_bad, augment
        self._hashes = hashes
        self.originals: dict[int, Tensor] = {}  # decoded, by index
        self._free_bytes = hold
        self._max_pixels = enough_pixels(image, augment.crop_scale) if augment else 0.0
        self.window = settings.shuffle_mib * 2**20
        self.reader = open_reader(data, 2 * self.window)  # caches the current window and the next
        self.groups = self.reader.groups(table.column("reference"))
        self._decode = "exact" if exactly else settings.decode
        if self._decode == "gpu" and device.type != "cuda":
            raise ParamsError(f"stream.decode is 'gpu', but the device is {device}; expected fast or exact")
        self._workers = default_workers() if settings.workers == "auto" else settings.workers
        self._prefetch = settings.prefetch
        self._lock = threading.Lock()
        self._problems: list[str] = []
        self.wait_seconds = 0.0  # time that steps have waited for batches

    def __len__(self) -> int:
        return len(self.labels)

    def encoded(self, index: int) -> bytes:
        """The original bytes of one image."""
        return self.reader.read(self.references[index])

    def order(self, generator: torch.Generator) -> Tensor:
        """The indices of an epoch, int64 [N], from a CPU generator; see `stream_order.shuffled_order`."""
        return shuffled_order(len(self), self.groups, self.window, generator)

    def warning(self) -> str | None:
        """Warning of `stream_order.order_warning`; None for images that are not read in groups."""
        return None if self.groups is None else order_warning(self.labels.numpy(), self.groups, self.window)

    def pixels(self, chosen: Tensor, draws: Draws | None = None) -> Tensor:
        """Pixels uint8 [B,3,H,W] at indices `chosen` int64 [B], on the CPU or the decoding device. draws: see `feed`."""
        with self.feed(chosen[None], draws=None if draws is None else [draws]) as feed:
            return next(feed)

    def batches(self, chosen: Tensor, size: int) -> Iterator[Tensor]:
        """`pixels` of the indices `chosen` in order, `size` at a time."""
        whole = len(chosen) // size * size
        with self.feed(chosen[:whole].view(-1, size), prefetch=1) as feed:
            yield from feed
        if whole < len(chosen):
            yield self.pixels(chosen[whole:])

    def feed(
        self, indices: Tensor, prefetch: int | None = None, draws: Iterable[Draws] | None = None
    ) -> PrefetchIterator:
        """Iterator over the batches of indices int64 [steps,B], with `prefetch` (or stream.prefetch) batches read ahead.

        Use it as a context manager, which ends its threads. draws: random numbers of the views of each batch. With
        resized crops a batch is then uint8 [B,views,3,H,W], as `apply_views` expects it.
        """
        drawn = iter(draws) if self._augment is not None and draws is not None else None
        return PrefetchIterator(self, indices, self._workers, prefetch or self._prefetch, drawn)

    def epoch_record(self, seconds: float) -> dict[str, float]:
        """Values for the record of an epoch of `seconds`: share of time waiting for data, images replaced on all ranks."""
        own = torch.tensor([len(self._problems), self.wait_seconds], dtype=torch.float64, device=self.device)
        replaced, waited = mean_over_ranks(own).tolist()
        self.wait_seconds = 0.0
        return {
            "data_wait": waited / seconds,
            **({"images_replaced": round(replaced * rank_count())} if self._replace_bad else {}),
        }

    def replaced(self) -> str | None:
        """A line about the images replaced since the last call; None if there were none."""
        with self._lock:
            problems, self._problems = sorted(self._problems), []
        if not problems:
            return None
        return (
            f"{counted(len(problems), 'image')} could not be read; replaced by others of their class, the first "
            f"{min(SHOWN, len(problems))}: {'; '.join(problems[:SHOWN])}; run `dvc repro -f split` to leave them out"
        )

    def decode(self, indices: Sequence[int], out: Tensor, draws: Draws | None = None) -> list[NvjpegImage]:
        """Read images into out uint8 [n,3,H,W], or with draws their views [n,V,3,H,W]; returns the images for nvJPEG."""
        nvjpeg, slots, originals = [], [], []
        for slot, index in enumerate(indices):
            read_index, data, pixels = self._read_or_replace(index, self._decode, whole=draws is not None)
            if pixels is None:
                nvjpeg.append((slot, read_index, data))
            elif draws is None:
                out[slot] = pixels
            else:
                slots.append(slot)
                originals.append(pixels)
        if draws is not None and slots:
            self._cut_views(originals, draws, slots, out)
        return nvjpeg

    def _cut_views(self, originals: Sequence[Tensor], draws: Draws, slots: Sequence[int], out: Tensor) -> None:
        height, width = torch.tensor([pixels.shape[1:] for pixels in originals]).unbind(1)
        boxes = cut_boxes(draws.of(list(slots)), height, width, self._augment)
        for slot, pixels, views in zip(slots, originals, boxes, strict=True):
            for view, box in enumerate(views):
                out[slot, view] = crop_and_resize(pixels, box, self._image, exactly=self._decode == "exact")

    @functools.cached_property
    def decoding(self) -> DecodingStream:
        """The stream on which nvJPEG decodes; one for all epochs, because PyTorch keeps freed memory for its stream."""
        return DecodingStream(self.device)

    def decode_on_gpu(self, pixels: Tensor, nvjpeg: list[NvjpegImage], draws: Draws | None = None) -> Tensor:
        """Copy a batch to the device and add the images that nvJPEG decodes."""
        pixels = pixels.to(self.device, non_blocking=True)
        slots, indices, encoded = zip(*nvjpeg, strict=True)
        try:
            decoded = decode_nvjpeg(encoded, self.device)
            if draws is None:
                decoded = [evaluation_view(image, self._image) for image in decoded]
        except RuntimeError:  # one unsupported image makes nvJPEG fail for the whole batch
            on_cpu = [self._read_or_replace(index, "fast", draws is not None)[2] for index in indices]
            decoded = [image.to(self.device) for image in on_cpu if image is not None]  # None only for "gpu"
        if draws is not None:
            self._cut_views(decoded, draws, slots, pixels)
        else:
            for slot, view in zip(slots, decoded, strict=True):
                pixels[slot] = view
        return pixels

    def allocate_batch(self, count: int, views: int | None = None) -> Tensor:
        """Allocate a batch tensor, with `views` images per row if given; in pinned memory if the device is a GPU."""
        shape, pinned = (count * (views or 1), 3, self._image.size, self._image.size), self.device.type == "cuda"
        # A tensor created in inference mode, as in evaluation, cannot be written by a thread outside of it. Decoders
        # write channels last.
        with torch.inference_mode(False):
            batch = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last, pin_memory=pinned)
        return batch if views is None else batch.unflatten(0, (count, views))

    def _read_or_replace(self, index: int, decode: str, whole: bool) -> tuple[int, bytes, Tensor | None]:
        # Index, bytes and pixels (None: for nvJPEG) of an image or of its replacement.
        try:
            return self._read_and_decode(index, decode, whole)
        except BadImageError as error:
            if not self._replace_bad:
                raise
            problem = error
        for other in other_images_of_class(self.labels, index):
            try:
                replacement = self._read_and_decode(other, decode, whole)
            except BadImageError:
                continue
            with self._lock:
                self._problems.append(str(problem))
            return replacement
        raise DataError(f"{problem}; and no other image of its class can be read instead")

    def _read_and_decode(self, index: int, decode: str, whole: bool) -> tuple[int, bytes, Tensor | None]:
        if whole and index in self.originals:
            return index, b"", self.originals[index]
        reference = self.references[index]
        data = self.reader.read(reference)
        if self._hashes is not None and hashlib.sha256(data).digest() != self._hashes[index].tobytes():
            raise DataError(f"{reference}: has changed since the images were split; run `dvc repro` again")
        try:
            if not whole:
                return index, data, DECODERS[decode](data, self._image)
            gpu, limit = decode == "gpu", self._max_pixels
            pixels = decode_unless_nvjpeg(data, self._image, limit) if gpu else decode_original(data, limit)
        except ImageError as error:
            raise BadImageError(f"{reference}: {error}; replace the image and run `dvc repro` again") from None
        with self._lock:
            if pixels is not None and pixels.nbytes <= self._free_bytes and index not in self.originals:
                self.originals[index] = pixels
                self._free_bytes -= pixels.nbytes
        return index, data, pixels
