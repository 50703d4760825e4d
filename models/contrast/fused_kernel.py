"""Fused CUDA kernels for `rest` of models.contrast.gml and its gradient, written in OpenAI Triton.

Not related to NVIDIA's Triton Inference Server. The forward kernel reads the similarities once and writes two vectors
of B numbers. The backward kernel reads the similarities once and writes their gradient once. No other tensor of size
[B,K] is allocated. State: equal to the plain version in Triton's interpreter, compiled for sm_80 and sm_90, not yet run
on a GPU in this project; fused_kernel_check.py tests the kernels on each GPU before use.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Replaces minus infinity: exp of it is 0, and a row without other keys (a memory of one class) yields no inf - inf = NaN.
FLOOR = -1e30
# Keys that a Triton program processes at a time: 8 warps with 16 float32 values per lane, which fit in registers.
BLOCK = 4096


def _rest_of_row(
    similarity,
    bias,
    own_first,
    own_last,
    temperature,
    rest,
    mean,
    keys,
    floor: tl.constexpr,
    block: tl.constexpr,
):
    """Forward kernel, one program per query: log-sum-exp of similarity / tau + bias over the keys of other classes.

    Also stores the mean similarity under their posterior, which the gradient of the temperature needs.
    """
    row = tl.program_id(0).to(tl.int64)
    tau = tl.load(temperature)
    first = tl.load(own_first + row)
    last = tl.load(own_last + row)
    peak = tau * 0 + floor
    total = tau * 0
    weighted = tau * 0
    for begin in range(0, keys, block):
        key = begin + tl.arange(0, block)
        inside = key < keys
        cosine = tl.load(similarity + row * keys + key, mask=inside, other=0.0)
        exponent = cosine / tau + tl.load(bias + key, mask=inside, other=0.0)
        exponent = tl.where(inside & ((key < first) | (key > last)), exponent, floor)
        # Online softmax: sums under the old maximum are rescaled to the new maximum.
        above = tl.maximum(peak, tl.max(exponent, 0))
        mass = tl.exp(exponent - above)
        rescale = tl.exp(peak - above)
        total = total * rescale + tl.sum(mass, 0)
        weighted = weighted * rescale + tl.sum(mass * cosine, 0)
        peak = above
    tl.store(rest + row, peak + tl.log(total))
    tl.store(mean + row, weighted / total)


def _gradient_of_block(
    similarity,
    bias,
    own_first,
    own_last,
    temperature,
    rest,
    to_rest,
    to_own,
    to_similarity,
    keys,
    longest,
    block: tl.constexpr,
):
    """Backward kernel, one program per query and block of keys: gradient of the similarities.

    At keys of other classes it is the gradient of `rest`, at keys of the query's class the incoming gradient `to_own`.
    """
    row = tl.program_id(0).to(tl.int64)
    key = tl.program_id(1) * block + tl.arange(0, block)
    inside = key < keys
    tau = tl.load(temperature)
    first = tl.load(own_first + row)
    own = (key >= first) & (key <= tl.load(own_last + row))
    cosine = tl.load(similarity + row * keys + key, mask=inside, other=0.0)
    exponent = cosine / tau + tl.load(bias + key, mask=inside, other=0.0) - tl.load(rest + row)
    # Exponents at keys of the query's class can be far above `rest`, and exp of them would overflow.
    posterior = tl.exp(tl.where(inside & (own == 0), exponent, 0.0))
    from_own = tl.load(to_own + row * longest + (key - first), mask=inside & own, other=0.0)
    gradient = tl.where(own, from_own, posterior * (tl.load(to_rest + row) / tau))
    tl.store(to_similarity + row * keys + key, gradient, mask=inside)


@functools.cache
def _kernels() -> tuple[Any, Any]:
    # Imported here and not at module level: Triton exists only for Linux, and its decorator reads TRITON_INTERPRET when
    # it is applied. `tl` must be a global of this module, because a kernel resolves its names there.
    global tl
    import triton
    import triton.language as tl

    return triton.jit(_rest_of_row), triton.jit(_gradient_of_block)


class FusedSplit(torch.autograd.Function):
    """Autograd function with the fused kernels: same arguments and results as SplitAtOwnClass of models.contrast.gml."""

    @staticmethod
    def forward(
        ctx: Any, similarity: Tensor, own_rows: Tensor, bias: Tensor, temperature: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        similarity = similarity.contiguous()
        batch, keys = similarity.shape
        own_first, own_last = own_rows[:, 0].contiguous(), own_rows[:, -1].contiguous()
        rest, mean = similarity.new_empty(batch), similarity.new_empty(batch)
        with torch.cuda.device_of(similarity):
            _kernels()[0][(batch,)](
                similarity, bias, own_first, own_last, temperature, rest, mean, keys, FLOOR, BLOCK, num_warps=8
            )
        ctx.save_for_backward(similarity, bias, own_first, own_last, temperature, rest, mean)
        return similarity.gather(1, own_rows), rest, rest.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_own: Tensor, to_rest: Tensor, to_rest_of_tau: Tensor) -> tuple[Tensor | None, ...]:
        similarity, bias, own_first, own_last, temperature, rest, mean = ctx.saved_tensors
        batch, keys = similarity.shape
        to_similarity = to_temperature = None
        if ctx.needs_input_grad[0]:
            to_similarity = torch.empty_like(similarity)
            with torch.cuda.device_of(similarity):
                _kernels()[1][(batch, -(-keys // BLOCK))](
                    similarity, bias, own_first, own_last, temperature, rest, to_rest.contiguous(),
                    to_own.contiguous(), to_similarity, keys, to_own.shape[1], BLOCK, num_warps=8,
                )  # fmt: skip
        if ctx.needs_input_grad[3]:
            to_temperature = -(to_rest_of_tau * mean).sum() / temperature**2
        return to_similarity, None, None, to_temperature
