"""Order of an epoch over a split, by windows if images are read in groups; and prefetching of its batches in threads.

libjpeg-turbo and torch release the GIL during their work.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipeline.augment import Draws
from pipeline.sources import Groups, in_parts

if TYPE_CHECKING:
    from pipeline.data.stream import ImageStream

WELL_MIXED = 0.5  # minimum share of the expected classes that a window should hold
PART = 16  # images per task of a thread
NvjpegImage = tuple[int, int, bytes]  # image that nvJPEG decodes: slot in the batch, index in the split, bytes


def shuffled_order(count: int, groups: Groups | None, window: int, generator: torch.Generator) -> Tensor:
    """A random permutation of 0..count-1, int64, from a CPU generator.

    Without groups all orders are equally likely. With groups (row groups of a table), the groups are put in random
    order and into windows of about `window` bytes, and within a window all orders are equally likely. So each group is
    read once per epoch, and a batch is drawn from the whole window. If the split fits in one window, the order is as
    without groups.
    """
    order = torch.randperm(count, generator=generator)
    if groups is None or groups.sizes.sum() <= window:
        return order
    windows = torch.from_numpy(assign_windows(groups, window, generator))
    return order[torch.sort(windows[order], stable=True).indices]


def assign_windows(groups: Groups, window: int, generator: torch.Generator) -> np.ndarray:
    """The window of each image, int64 [N], numbered from 0: groups in random order, divided every `window` bytes."""
    order = torch.randperm(len(groups.sizes), generator=generator).numpy()
    used = np.bincount(groups.number, minlength=len(groups.sizes)) > 0  # the split may not use a group at all
    sizes = np.where(used, groups.sizes, 0)[order]
    window_of_group = np.empty(len(order), dtype=np.int64)
    window_of_group[order] = (np.cumsum(sizes) - sizes) // window
    return window_of_group[groups.number]


def class_share(labels: np.ndarray, windows: np.ndarray) -> float:
    """Classes that a window holds, relative to as many images drawn from the whole split; 1 if it is well mixed.

    Far below 1, a batch holds few classes, because the table is sorted by class.
    """
    count, classes = windows.max() + 1, int(labels.max()) + 1
    mean_classes = len(np.unique(windows * classes + labels)) / count
    sizes = np.bincount(labels, minlength=classes)
    return float(mean_classes / (1 - (1 - 1 / count) ** sizes).sum())


def order_warning(labels: np.ndarray, groups: Groups, window: int) -> str | None:
    """A warning if a table is sorted by class, so that its windows hold too few classes; None otherwise."""
    if groups.sizes.sum() <= window or not len(labels):
        return None
    share = class_share(labels, assign_windows(groups, window, torch.Generator().manual_seed(0)))
    if share >= WELL_MIXED:
        return None
    return (
        f"the table is sorted by class: the {window >> 20} MiB that are shuffled at a time hold {share:.0%} of the "
        "expected classes; raise stream.shuffle_mib, or write the shards in random order (data pack --shuffle)"
    )


def other_images_of_class(labels: Tensor, index: int) -> list[int]:
    """The other images of an image's class, those after it first: the same order on every rank and after every restart."""
    members = torch.nonzero(labels == labels[index]).flatten()
    start = int(torch.searchsorted(members, index))
    return [*members[start + 1 :].tolist(), *members[:start].tolist()]


class PrefetchIterator(Iterator[Tensor]):
    """Iterator over a stream's batches in order, with `prefetch` batches read ahead by threads; a context manager ends them.

    draws: random numbers of each batch if its views are cut from the originals; drawn as far ahead as images are read.
    """

    def __init__(
        self, stream: ImageStream, indices: Tensor, workers: int, prefetch: int, draws: Iterator[Draws] | None = None
    ) -> None:
        self._stream, self._indices, self._draws = stream, iter(indices), draws
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="stream")
        self._ahead: deque[tuple[Tensor, list[tuple[int, Future[list[NvjpegImage]]]], list[Draws]]] = deque()
        for _ in range(prefetch + 1):
            self._submit_batch()

    def __next__(self) -> Tensor:
        if not self._ahead:
            raise StopIteration
        started, queued = time.perf_counter(), queued_steps(self._stream.device)
        pixels, parts, draws = self._ahead.popleft()
        nvjpeg = [(start + slot, index, data) for start, part in parts for slot, index, data in part.result()]
        self._submit_batch()
        if nvjpeg:
            pixels = self._stream.decoding.run(partial(self._stream.decode_on_gpu, pixels, nvjpeg, *draws))
        if queued is None or queued.query():
            self._stream.wait_seconds += time.perf_counter() - started
        return pixels

    def _submit_batch(self) -> None:
        indices = next(self._indices, None)
        if indices is None:
            return
        draws = [] if self._draws is None else [next(self._draws)]
        pixels = self._stream.allocate_batch(len(indices), *(drawn.views for drawn in draws))
        parts, start = [], 0
        for part in in_parts(indices.tolist(), PART):
            stop = start + len(part)
            part_draws = (drawn.rows(start, stop) for drawn in draws)
            task = partial(self._stream.decode, part, pixels[start:stop], *part_draws)
            parts.append((start, self._pool.submit(task)))
            start = stop
        self._ahead.append((pixels, parts, draws))

    def __enter__(self) -> PrefetchIterator:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def queued_steps(device: torch.device) -> torch.cuda.Event | None:
    """Event that is complete when a GPU has run the steps that are queued now; None for the CPU, which queues none."""
    return None if device.type == "cpu" else torch.cuda.current_stream(device).record_event()


def default_workers() -> int:
    """Default number of threads: usable cores, divided by the processes that torchrun started on this host."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
