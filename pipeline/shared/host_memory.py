"""Memory of the host: keep what a training step frees for the next one, how much is free, the peak of a run."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
from pathlib import Path

import torch

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


def free_bytes() -> int:
    """Memory that this process may still take, of the machine's and of its control group's (a container's limit), shared
    evenly with the other processes that torchrun started on the machine."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError):
        available = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        limits += [int(available[1]) * 1024] if available else []
    with contextlib.suppress(OSError, ValueError):  # `max` where there is no limit
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        limits.append(max(limit - used, 0))
    return min(limits) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory in MiB: of the device's allocator on CUDA, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
