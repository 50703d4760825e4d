"""The C library's allocator, told to keep what a training step frees: the next step wants the same again."""

from __future__ import annotations

import ctypes

# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_FROM_HEAP = 2**30  # bytes: larger blocks than any activation are mapped as ever
NEVER = -1


def keep_freed_memory() -> bool:
    """Never give freed memory back to the system until the process ends; whether the C library takes the advice.

    Without it every activation of a few MiB is mapped, cleared by the kernel page by page, and unmapped again: a tenth
    of a CPU step. The process then stays as large as it has been at its largest. Not glibc (macOS, musl): nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Both are set, because setting either ends glibc's own adjustment of both.
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_FROM_HEAP)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
