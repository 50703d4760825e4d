"""Host memory: keep freed memory in the process for reuse, pinned copies, free memory, peak memory of a run."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
from pathlib import Path

import torch
from torch import Tensor

# Parameters of glibc's mallopt(3); M_TRIM_THRESHOLD -1 turns trimming off.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_FROM_HEAP = 2**30  # bytes; larger blocks, larger than any activation, are still allocated with mmap


def keep_freed_memory() -> bool:
    """Set glibc's malloc to keep freed memory until the process ends. Returns whether the C library accepted it.

    By default each activation of a few MiB is mapped, zeroed by the kernel page by page, and unmapped again, which
    takes a tenth of a CPU step. With the setting the process does not shrink. No effect without glibc (macOS, musl).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Set both, because setting one turns off glibc's automatic adjustment of both.
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_FROM_HEAP)) and bool(mallopt(M_TRIM_THRESHOLD, -1))


def copy_to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy to a device; asynchronous, through pinned memory, for a GPU."""
    to_gpu = torch.device(device).type == "cuda" and not tensor.is_cuda
    return (tensor.pin_memory() if to_gpu else tensor).to(device, non_blocking=True)


def free_bytes() -> int:
    """Free host memory in bytes for this process: minimum of the machine's and the control group's (container limit).

    It is divided equally between the processes that torchrun started on the machine.
    """
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError):
        available = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        limits += [int(available[1]) * 1024] if available else []
    with contextlib.suppress(OSError, ValueError):  # `max` where there is no limit
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        limits.append(max(limit - used, 0))
    return min(limits) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory in MiB: of PyTorch's allocator on CUDA, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
