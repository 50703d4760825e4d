"""Prefetching of a stream's batches in threads; libjpeg-turbo and torch release the GIL during their work."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Protocol

from torch import Tensor

from pipeline.augment import Draws
from pipeline.sources import in_parts

PART = 16  # images that a thread reads in one task
Left = tuple[int, int, bytes]  # of an image left to the GPU: slot in the batch, index in the split, bytes


class Decoding(Protocol):
    """The methods of an `ImageStream` that a PrefetchIterator calls."""

    def empty(self, count: int, *views: int) -> Tensor:
        """Allocate a batch, with `views` images per row if given."""
        ...

    def decode(self, indices: Sequence[int], out: Tensor, *draws: Draws) -> list[Left]:
        """Read images into `out`, their views if draws are given; returns the images left to the GPU."""
        ...

    def decode_on_gpu(self, pixels: Tensor, left: list[Left], *draws: Draws) -> Tensor:
        """The batch on the device, with the images that were left to the GPU."""
        ...

    def waited(self, seconds: float) -> None:
        """Add time that a step has waited."""
        ...


class PrefetchIterator(Iterator[Tensor]):
    """Iterator over a stream's batches in order, with `prefetch` batches read ahead by threads; a context manager ends them.

    draws: random numbers of each batch if its views are cut from the originals; drawn as far ahead as images are read.
    """

    def __init__(
        self, stream: Decoding, indices: Tensor, workers: int, prefetch: int, draws: Iterator[Draws] | None = None
    ) -> None:
        self._stream, self._indices, self._draws = stream, iter(indices), draws
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="stream")
        self._ahead: deque[tuple[Tensor, list[tuple[int, Future[list[Left]]]], list[Draws]]] = deque()
        for _ in range(prefetch + 1):
            self._read_on()

    def __next__(self) -> Tensor:
        if not self._ahead:
            raise StopIteration
        started = time.perf_counter()
        pixels, parts, draws = self._ahead.popleft()
        left = [(start + slot, *rest) for start, part in parts for slot, *rest in part.result()]
        self._stream.waited(time.perf_counter() - started)
        self._read_on()
        return self._stream.decode_on_gpu(pixels, left, *draws) if left else pixels

    def _read_on(self) -> None:
        indices = next(self._indices, None)
        if indices is None:
            return
        draws = [] if self._draws is None else [next(self._draws)]
        pixels = self._stream.empty(len(indices), *(drawn.views for drawn in draws))
        parts, start = [], 0
        for part in in_parts(indices.tolist(), PART):
            stop = start + len(part)
            own = (drawn.rows(start, stop) for drawn in draws)
            work = partial(self._stream.decode, part, pixels[start:stop], *own)
            parts.append((start, self._pool.submit(work)))
            start = stop
        self._ahead.append((pixels, parts, draws))

    def close(self) -> None:
        """Stop the threads; tasks that have not started are dropped."""
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> PrefetchIterator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def workers_of_a_rank() -> int:
    """Number of threads of this process: its usable cores, divided by the processes that torchrun started on this host."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
