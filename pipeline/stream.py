"""A split read as it is needed: a stream of batches for data that do not fit the memory of the device.

It takes the place of `dataset.Images`. Of each image there is a label and two texts in memory, and of pixels only the
batches that are read ahead, so that a process does not grow with the split.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from models.preprocess import ImageError
from models.ranks import mean_over_ranks, rank_count
from pipeline.artifacts import SPLIT
from pipeline.augment import Draws, cut_boxes
from pipeline.errors import DataError, ParamsError
from pipeline.params import AugmentParams, Params
from pipeline.sources import BadImageError, open_reader
from pipeline.splits import read_split
from pipeline.stream_decoding import (
    cut,
    enough_pixels,
    exact,
    fast,
    left_to_gpu,
    nvjpeg,
    nvjpeg_originals,
    original,
)
from pipeline.stream_feed import Feed, Left
from pipeline.stream_order import class_share, shuffled, windows_of
from serving.terminal import counted

SHOWN = 5  # replaced images that a message names
WELL_MIXED = 0.5  # share of its classes that a window should hold at least


class Texts(Sequence[str]):
    """A column of text, without a Python object for each."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, place: int) -> str:
        return self._column[place].as_py()


class ImageStream:
    """The images of one split, decoded as they are asked for: what `dataset.Images` offers, but for the tensor of all.

    replace_bad: an image that cannot be read is replaced by another of its class, which is counted and told, so that
    batches keep their shape and classes their share; without it such an image raises DataError. exactly: pixels are those
    of the server's decoder whatever stream.decode says. augment: of a section with resized crops; its views are cut from the
    originals where draws come with the places. hold: bytes of decoded originals that stay in memory. Raises ParamsError when
    the split is not made or stream.decode is gpu and the device is none.
    """

    images = None

    def __init__(
        self,
        params: Params,
        split: str,
        device: torch.device,
        folder: Path = SPLIT,
        *,
        replace_bad: bool = False,
        exactly: bool = False,
        augment: AugmentParams | None = None,
        hold: float = 0,
    ) -> None:
        table = read_split(split, ["sample_id", "label", "reference"], folder)
        self.labels = torch.from_numpy(table.column("label").to_numpy().astype(np.int64))
        self.sample_ids, self.references = Texts(table.column("sample_id")), Texts(table.column("reference"))
        self._image, self._device, self._replace = params.image, device, replace_bad
        self._augment, self._room = augment, hold
        self._held: dict[int, Tensor] = {}
        self._most = enough_pixels(params.image, augment.crop_scale) if augment else 0.0
        self._window = params.stream.shuffle_mib * 2**20
        # Of the window that is read and of the next.
        self._reader = open_reader(params.data, 2 * self._window)
        self._groups = self._reader.groups(table.column("reference"))
        self._kind = "exact" if exactly else params.stream.decode
        if self._kind == "gpu" and device.type != "cuda":
            raise ParamsError(f"stream.decode is 'gpu', but the device is {device}; expected fast or exact")
        workers = params.stream.workers
        self._workers = workers_of_a_rank() if workers == "auto" else workers
        self._prefetch = params.stream.prefetch
        self._lock = threading.Lock()
        self._replaced: list[str] = []
        self._waited = 0.0

    def __len__(self) -> int:
        return len(self.labels)

    def encoded(self, index: int) -> bytes:
        """The original bytes of one image."""
        return self._reader.read(self.references[index])

    def order(self, generator: torch.Generator) -> Tensor:
        """The places of an epoch, int64 [N], from a CPU generator; see `stream_order.shuffled`."""
        return shuffled(len(self), self._groups, self._window, generator)

    def warning(self) -> str | None:
        """What is wrong with the order of a table that is sorted by class; None where there is nothing to say."""
        if self._groups is None or self._groups.sizes.sum() <= self._window or not len(self):
            return None
        share = class_share(
            self.labels.numpy(), windows_of(self._groups, self._window, torch.Generator().manual_seed(0))
        )
        if share >= WELL_MIXED:
            return None
        return (
            f"the table lies sorted by class: the {self._window >> 20} MiB that are shuffled at a time hold {share:.0%} of the "
            "classes that they should; raise stream.shuffle_mib, or write the shards in random order (data pack --shuffle)"
        )

    def pixels(self, chosen: Tensor, draws: Draws | None = None) -> Tensor:
        """uint8 [B,3,H,W] of the images at places `chosen` int64 [B]; on the CPU, or on the device where that decodes.

        draws: as of `feed`.
        """
        with self.feed(chosen[None], draws=None if draws is None else [draws]) as feed:
            return next(feed)

    def batches(self, chosen: Tensor, size: int) -> Iterator[Tensor]:
        """`pixels` of the places `chosen` in order, `size` at a time."""
        whole = len(chosen) // size * size
        with self.feed(chosen[:whole].view(-1, size), prefetch=1) as feed:
            yield from feed
        if whole < len(chosen):
            yield self.pixels(chosen[whole:])

    def feed(self, places: Tensor, prefetch: int | None = None, draws: Iterable[Draws] | None = None) -> Feed:
        """The batches of places int64 [steps,B], `prefetch` (or stream.prefetch) of them read ahead while its block lasts.

        draws: of the views of each batch. With resized crops a batch is then uint8 [B,views,3,H,W], as `apply_views` takes it.
        """
        drawn = iter(draws) if self._augment is not None and draws is not None else None
        return Feed(self, places, self._workers, prefetch or self._prefetch, drawn)

    def epoch_record(self, seconds: float) -> dict[str, float]:
        """Of the epoch that ends after `seconds`: share of it spent waiting for data, images replaced on all ranks."""
        replaced = torch.tensor([float(len(self._replaced)), self._waited], dtype=torch.float64, device=self._device)
        count, waited = (mean_over_ranks(replaced) * torch.tensor([rank_count(), 1.0], device=self._device)).tolist()
        self._waited = 0.0
        return {"data_wait": waited / seconds, **({"images_replaced": round(count)} if self._replace else {})}

    def replaced(self) -> str | None:
        """What was replaced since the last call, in a line; None where nothing was."""
        with self._lock:
            told, self._replaced = sorted(self._replaced), []
        if not told:
            return None
        return (
            f"{counted(len(told), 'image')} could not be read; replaced by others of their class, the first "
            f"{min(SHOWN, len(told))}: {'; '.join(told[:SHOWN])}; run `dvc repro -f split` to leave them out"
        )

    def decode(self, places: Sequence[int], out: Tensor, draws: Draws | None = None) -> list[Left]:
        """Read some images into out uint8 [n,3,H,W], or with draws their views [n,V,3,H,W]; those left to the GPU, by slot."""
        left, slots, originals = [], [], []
        for slot, place in enumerate(places):
            found, data, pixels = self._usable(place, self._kind, whole=draws is not None)
            if pixels is None:
                left.append((slot, found, data))
            elif draws is None:
                out[slot] = pixels
            else:
                slots.append(slot)
                originals.append(pixels)
        if draws is not None and slots:
            self._cut(originals, draws, slots, out)
        return left

    def _cut(self, originals: Sequence[Tensor], draws: Draws, slots: Sequence[int], out: Tensor) -> None:
        height, width = torch.tensor([pixels.shape[1:] for pixels in originals]).unbind(1)
        boxes = cut_boxes(draws.of(list(slots)), height, width, self._augment)
        for slot, pixels, views in zip(slots, originals, boxes, strict=True):
            for view, box in enumerate(views):
                out[slot, view] = cut(pixels, box, self._image, exactly=self._kind == "exact")

    def decode_on_gpu(self, pixels: Tensor, left: list[Left], draws: Draws | None = None) -> Tensor:
        """A batch on the device, its pixels those of the CPU but for images that are `left` to nvJPEG; as `decode`."""
        pixels = pixels.to(self._device, non_blocking=True)
        if not left:
            return pixels
        slots, places, encoded = zip(*left, strict=True)
        decoded: Tensor | list[Tensor]
        try:
            if draws is None:
                decoded = nvjpeg(list(encoded), self._image, self._device)
            else:
                decoded = nvjpeg_originals(list(encoded), self._device)
        except RuntimeError:  # one image that nvJPEG does not know spoils the batch
            decoded = [self._on_cpu(place, draws is not None).to(self._device) for place in places]
        if draws is not None:
            self._cut(decoded, draws, slots, pixels)
        else:
            for slot, view in zip(slots, decoded, strict=True):
                pixels[slot] = view
        return pixels

    def empty(self, count: int, views: int | None = None) -> Tensor:
        """An empty batch tensor, with `views` images for each row if given; in pinned memory if the device is a GPU."""
        size = self._image.size
        # A tensor made in inference mode, as evaluation asks for, cannot be filled by a thread that is not in it.
        with torch.inference_mode(False):
            room = torch.empty(
                (count * (views or 1), 3, size, size),
                dtype=torch.uint8,
                memory_format=torch.channels_last,  # as decoders write
                pin_memory=self._device.type == "cuda",
            )
        return room if views is None else room.unflatten(0, (count, views))

    def waited(self, seconds: float) -> None:
        """Count time that the step has waited for a batch."""
        self._waited += seconds

    def _on_cpu(self, place: int, whole: bool) -> Tensor:
        _, _, pixels = self._usable(place, "fast", whole)
        assert pixels is not None  # only "gpu" leaves any
        return pixels

    def _usable(self, place: int, kind: str, whole: bool) -> tuple[int, bytes, Tensor | None]:
        # Of the image at a place, or of one that takes it: its own place, its bytes, its pixels unless left to the GPU.
        try:
            return self._decoded(place, kind, whole)
        except BadImageError as error:
            if not self._replace:
                raise
            problem = error
        for other in self._others(place):
            try:
                found = self._decoded(other, kind, whole)
            except BadImageError:
                continue
            with self._lock:
                self._replaced.append(str(problem))
            return found
        raise DataError(f"{problem}; and no other image of its class can be read in its place")

    def _decoded(self, place: int, kind: str, whole: bool) -> tuple[int, bytes, Tensor | None]:
        if whole and place in self._held:
            return place, b"", self._held[place]
        reference = self.references[place]
        data = self._reader.read(reference)
        try:
            if not whole:
                return place, data, {"exact": exact, "fast": fast, "gpu": left_to_gpu}[kind](data, self._image)
            gpu = kind == "gpu"
            pixels = left_to_gpu(data, self._image, self._most) if gpu else original(data, self._most)
        except ImageError as error:
            raise BadImageError(f"{reference}: {error}; replace the image and run `dvc repro` again") from None
        if pixels is not None:
            self._hold(place, pixels)
        return place, data, pixels

    def _hold(self, place: int, pixels: Tensor) -> None:
        with self._lock:
            if pixels.nbytes <= self._room and place not in self._held:
                self._held[place] = pixels
                self._room -= pixels.nbytes

    def _others(self, place: int) -> Iterator[int]:
        # Those behind it first: the same on every rank and after every restart.
        members = torch.nonzero(self.labels == self.labels[place]).flatten()
        start = int(torch.searchsorted(members, place))
        yield from (*members[start + 1 :].tolist(), *members[:start].tolist())


def workers_of_a_rank() -> int:
    """A thread for each core that this process may use, shared with the other processes that torchrun started here."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
