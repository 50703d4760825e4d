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
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of params.device for one process, a GPU as the current one. Raises ParamsError when it does not exist."""
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type == "cpu":
        return device
    device = torch.device("cuda", local_rank if device.index is None else device.index)
    if device.index >= torch.cuda.device_count():
        raise ParamsError(
            f"device is {name!r} (process {local_rank}), but {torch.cuda.device_count()} GPUs are visible; "
            "expected auto or cpu, or fewer processes"
        )
    # PyTorch makes streams and events on the current GPU, whatever the device of the tensors.
    torch.cuda.set_device(device)
    return device
