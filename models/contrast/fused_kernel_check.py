"""Check of the fused kernels before use, once for each device and shape: results, gradients and speed.

Results and gradients on generated inputs of the same shape are compared with those of the plain version; on a GPU the
time is compared too. If a check fails (Triton or a compiler is missing, a result differs, the kernels are slower), the
plain version is used and one line with the reason is printed to stderr.
"""

from __future__ import annotations

import os
import subprocess
import sys

import torch
from torch import Tensor

from models.contrast.fused_kernel import FusedOwnClassLogSumExp

# Relative to the largest value. Sums in another order differ by 1e-6; results of a wrong kernel differ by far more.
CLOSE = 1e-4
ROUNDS = 20

CHECKED: dict[tuple[torch.device | int, ...], bool] = {}


class KernelFault(Exception):
    """The kernels differ from the plain version or are slower; the message states the difference."""


def kernels_supported(similarity: Tensor) -> bool:
    """Whether the fused kernels support the tensor: float32 on CUDA (or Triton's interpreter), not inside torch.compile."""
    if torch.compiler.is_compiling() or similarity.dtype != torch.float32:
        return False
    return similarity.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def kernels_pass_check(similarity: Tensor, longest: int, plain: type[torch.autograd.Function]) -> bool:
    """Whether the kernels equal `plain` and are not slower, for [B,K] similarities and at most `longest` keys per class.

    The first call for a device and shape runs the check and caches the result; if the check fails, it prints one line
    to stderr. The check cannot run while a CUDA graph is captured: the result is then False unless an earlier call has
    cached one.
    """
    batch, keys = similarity.shape
    case = (similarity.device, batch, keys, longest)
    if case not in CHECKED:
        if similarity.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        fault = kernel_fault(*case, plain)
        if fault:
            print(
                f"contrast losses on {similarity.device} at [{batch}, {keys}]: plain version, not the fused kernels: {fault}",
                file=sys.stderr,
                flush=True,
            )
        CHECKED[case] = fault is None
    return CHECKED[case]


def kernel_fault(
    device: torch.device, batch: int, keys: int, longest: int, plain: type[torch.autograd.Function], timed: bool = True
) -> str | None:
    """Check the kernels at one shape: the reason against their use in one line, or None.

    timed: also compare the time on CUDA.
    """
    try:
        import triton.errors
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    try:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            inputs = random_inputs(device, batch, keys, longest)
            _compare(results(FusedOwnClassLogSumExp, *inputs), results(plain, *inputs))
            if timed and device.type == "cuda":
                fused_ms, plain_ms = (device_milliseconds(split, inputs) for split in (FusedOwnClassLogSumExp, plain))
                if fused_ms > plain_ms:
                    raise KernelFault(f"they take {fused_ms:.3f} ms, the plain version {plain_ms:.3f}")
    # Exceptions of Triton, its compiler and the driver. A missing compiler or cache folder raises one of the last two.
    except (KernelFault, triton.errors.TritonError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None


def random_inputs(device: torch.device, batch: int, keys: int, longest: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random inputs: similarity [B,K], own_rows [B,L], bias [K] and temperature [], as `contrast_losses` passes them."""
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
    """All outputs and gradients by name. The incoming gradients of the outputs differ from one another."""
    leaves = [similarity.clone().requires_grad_(), temperature.clone().requires_grad_()]
    outputs = split.apply(leaves[0], own_rows, bias, leaves[1])
    names = ("own", "other log-sum-exp", "other log-sum-exp of tau")
    directions = [torch.linspace(0.5, 1.5, out.numel(), device=out.device).view_as(out) for out in outputs]
    # Positions that repeat the last key (padding) never have a gradient in training, so it is 0 here too.
    directions[0] = directions[0] * (own_rows.diff(dim=1, prepend=own_rows[:, :1] - 1) != 0)
    gradients = torch.autograd.grad(outputs, leaves, directions)
    return {**dict(zip(names, outputs, strict=True)), "d similarity": gradients[0], "d temperature": gradients[1]}


def _compare(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        error = ((actual[name] - tensor).abs().max() / tensor.abs().max()).item()
        if not error < CLOSE:  # `not <` is also true for NaN
            raise KernelFault(f"{name} is off by {error:.1e} of its largest value")


def device_milliseconds(split: type[torch.autograd.Function], inputs: tuple[Tensor, ...]) -> float:
    """GPU time of forward and backward in milliseconds, measured on a replayed CUDA graph, as in a captured training step."""
    with torch.cuda.device(inputs[0].device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            results(split, *inputs)  # compile the kernels and allocate before the capture
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
