"""Devices and process group of training: torchrun starts one process per GPU (or gloo on CPUs); rank 0 prints and writes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from pipeline.shared.errors import ParamsError


@contextlib.contextmanager
def joined_ranks(name: str) -> Iterator[torch.device]:
    """The device of this process; joins the process group if torchrun started several, and leaves it when the block ends.

    name is params.device: `auto` is the first GPU or the CPU, under torchrun the GPU of the local rank. Raises
    ParamsError when the device does not exist.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    device = choose_device(name, int(os.environ.get("LOCAL_RANK", "0")) if ranks > 1 else 0)
    if ranks == 1 or dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of params.device for one process. Raises ParamsError when the device does not exist."""
    if name == "auto":
        return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    device = torch.device(name)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local_rank)
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise ParamsError(
            f"device is {name!r} (process {local_rank}), but {torch.cuda.device_count()} GPUs are visible; "
            "expected auto or cpu, or fewer processes"
        )
    return device
