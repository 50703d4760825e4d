"""Prefetching of a stream's batches in threads; libjpeg-turbo and torch release the GIL during their work."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from pipeline.augment import Draws
from pipeline.sources import in_parts

if TYPE_CHECKING:
    from pipeline.data.stream import ImageStream

PART = 16  # images per task of a thread
NvjpegImage = tuple[int, int, bytes]  # image that nvJPEG decodes: slot in the batch, index in the split, bytes


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
        started = time.perf_counter()
        pixels, parts, draws = self._ahead.popleft()
        nvjpeg = [(start + slot, index, data) for start, part in parts for slot, index, data in part.result()]
        self._stream.wait_seconds += time.perf_counter() - started
        self._submit_batch()
        return self._stream.decode_on_gpu(pixels, nvjpeg, *draws) if nvjpeg else pixels

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


def default_workers() -> int:
    """Default number of threads: usable cores, divided by the processes that torchrun started on this host."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
