"""Devices and process group of training: torchrun starts one process per GPU (or gloo on CPUs); rank 0 prints and writes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from pipeline.shared.errors import ParamsError, StageError


@contextlib.contextmanager
def joined_ranks(name: str) -> Iterator[torch.device]:
    """The device of this process; joins the process group if torchrun started several, and leaves it when the block ends.

    name is params.device: `auto` is the first GPU or the CPU, under torchrun the GPU of the local rank. Raises
    ParamsError when the device does not exist, StageError when the block needs more memory than a GPU has.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    device = choose_device(name, int(os.environ.get("LOCAL_RANK", "0")) if ranks > 1 else 0)
    if device.type == "cuda":
        # PyTorch makes streams and events on the current GPU, whatever the device of the tensors.
        torch.cuda.set_device(device)
    if ranks == 1 or dist.is_initialized():
        with memory_named():
            yield device
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        with memory_named():
            yield device
    finally:
        dist.destroy_process_group()


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of params.device for one process. Raises ParamsError when the device does not exist."""
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type == "cpu":
        return device
    device = torch.device("cuda", local_rank if device.index is None else device.index)
    if device.index >= torch.cuda.device_count():
        raise ParamsError(
            f"device is {name!r} (process {local_rank}), but {torch.cuda.device_count()} GPUs are visible; "
            "expected auto or cpu, or fewer processes"
        )
    return device


@contextlib.contextmanager
def memory_named() -> Iterator[None]:
    """Context in which too little memory of a GPU is a StageError that names what to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = ". ".join(str(error).split(". ")[:2])  # without the advice for PyTorch's allocator
        raise StageError(
            f"{reason}; lower the stage's batch_size, raise its accumulate, or train fewer seeds at once "
            "(engine.side_by_side); `tailor memory` estimates a step"
        ) from None
