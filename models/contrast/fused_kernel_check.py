"""Test of the fused kernels on the device and shape on which they are about to run, once for each device and shape.

Their results and gradients on made inputs of the very shape are held against the plain version's, and on a GPU their
time as well. Whatever is amiss (Triton or a compiler missing, a number wrong, the kernel slow) leaves the plain version
in use and is said in one line.
"""

from __future__ import annotations

import os
import subprocess
import sys

import torch
from torch import Tensor

from models.contrast.fused_kernel import FusedSplit

# Sums in another order differ by 1e-6 of the largest value; a kernel that is wrong, by far more.
CLOSE = 1e-4
ROUNDS = 20

_ANSWERS: dict[tuple[torch.device | int, ...], bool] = {}


class KernelFault(Exception):
    """The kernels do not do what the plain version does, or not as fast; the message says what."""


def kernels_may_run(similarity: Tensor) -> bool:
    """Whether there is anything to ask: float32 on CUDA (or Triton's interpreter), outside a compiled graph."""
    if torch.compiler.is_compiling() or similarity.dtype != torch.float32:
        return False
    return similarity.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def kernels_are_right(similarity: Tensor, longest: int, plain: type[torch.autograd.Function]) -> bool:
    """Whether the kernels do what `plain` does, and as fast, for [B,K] similarities and runs of up to `longest` keys.

    The first call of a shape on a device answers, and prints a line where the answer is no. A CUDA graph that is
    being captured cannot be asked: there the answer is no until a call outside it has been made.
    """
    batch, keys = similarity.shape
    place = (similarity.device, batch, keys, longest)
    if place not in _ANSWERS:
        if similarity.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        fault = fault_of_kernels(*place, plain)
        if fault:
            print(
                f"contrast losses on {similarity.device} at [{batch}, {keys}]: plain version, not the fused kernels: {fault}",
                file=sys.stderr,
                flush=True,
            )
        _ANSWERS[place] = fault is None
    return _ANSWERS[place]


def fault_of_kernels(
    device: torch.device, batch: int, keys: int, longest: int, plain: type[torch.autograd.Function], timed: bool = True
) -> str | None:
    """What speaks against the kernels at this shape, in a line; None for nothing. timed: whether being slow on CUDA does."""
    try:
        import triton.errors
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    try:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            inputs = made_inputs(device, batch, keys, longest)
            _compare(results(FusedSplit, *inputs), results(plain, *inputs))
            if timed and device.type == "cuda":
                ours, theirs = (device_milliseconds(split, inputs) for split in (FusedSplit, plain))
                if ours > theirs:
                    raise KernelFault(f"they take {ours:.3f} ms, the plain version {theirs:.3f}")
    # What Triton, its compiler and the driver raise; a missing compiler or cache folder is one of the last two.
    except (KernelFault, triton.errors.TritonError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None


def made_inputs(device: torch.device, batch: int, keys: int, longest: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """similarity [B,K], own_rows [B,L], bias [K] and temperature [], as `contrast_losses` gives them to either version."""
    generator = torch.Generator().manual_seed(0)
    similarity = 2 * torch.rand(batch, keys, generator=generator) - 1
    first = torch.randint(max(keys - longest, 0) + 1, (batch, 1), generator=generator)
    length = torch.randint(1, longest + 1, (batch, 1), generator=generator)
    own_rows = first + torch.minimum(torch.arange(longest), length - 1)
    bias = torch.rand(keys, generator=generator).log()
    return similarity.to(device), own_rows.to(device), bias.to(device), torch.tensor(0.1, device=device)


def results(
    split: type[torch.autograd.Function], similarity: Tensor, own_rows: Tensor, bias: Tensor, temperature: Tensor
) -> dict[str, Tensor]:
    """Every output and gradient by name, for gradients of the outputs that differ from one another."""
    leaves = [similarity.clone().requires_grad_(), temperature.clone().requires_grad_()]
    outputs = split.apply(leaves[0], own_rows, bias, leaves[1])
    names = ("own", "rest", "rest of tau")
    directions = [torch.linspace(0.5, 1.5, out.numel(), device=out.device).view_as(out) for out in outputs]
    # Past its run's end a query looks at its last key again, from where no gradient ever comes.
    directions[0] = directions[0] * (own_rows.diff(dim=1, prepend=own_rows[:, :1] - 1) != 0)
    gradients = torch.autograd.grad(outputs, leaves, directions)
    found = dict(zip(names, outputs, strict=True))
    return {**found, "d similarity": gradients[0], "d temperature": gradients[1]}


def _compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        error = ((found[name] - tensor).abs().max() / tensor.abs().max()).item()
        if not error < CLOSE:  # nor when it is NaN
            raise KernelFault(f"{name} is off by {error:.1e} of its largest value")


def device_milliseconds(split: type[torch.autograd.Function], inputs: tuple[Tensor, ...]) -> float:
    """Time of forward and backward on the GPU alone, replayed as a graph, as a captured training step runs them."""
    with torch.cuda.device(inputs[0].device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            results(split, *inputs)  # allocates and compiles what a capture must find in place
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results(split, *inputs)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        begin.record()
        for _ in range(ROUNDS):
            graph.replay()
        end.record()
        end.synchronize()
    elapsed: float = begin.elapsed_time(end)
    return elapsed / ROUNDS
