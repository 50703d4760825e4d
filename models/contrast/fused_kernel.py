"""Fused CUDA kernels for `other_logsumexp` of models.contrast.gml and its gradient, written in OpenAI Triton.

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


def _other_logsumexp_kernel(
    similarity,
    bias,
    own_first,
    own_last,
    temperature,
    other_logsumexp,
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
    tl.store(other_logsumexp + row, peak + tl.log(total))
    tl.store(mean + row, weighted / total)


def _similarity_gradient_kernel(
    similarity,
    bias,
    own_first,
    own_last,
    temperature,
    other_logsumexp,
    grad_other_gml,
    grad_own,
    grad_similarity,
    keys,
    longest,
    block: tl.constexpr,
):
    """Backward kernel, one program per query and block of keys: gradient of the similarities.

    At keys of other classes it is the gradient of `other_logsumexp`, at keys of the query's class `grad_own`.
    """
    row = tl.program_id(0).to(tl.int64)
    key = tl.program_id(1) * block + tl.arange(0, block)
    inside = key < keys
    tau = tl.load(temperature)
    first = tl.load(own_first + row)
    own = (key >= first) & (key <= tl.load(own_last + row))
    cosine = tl.load(similarity + row * keys + key, mask=inside, other=0.0)
    exponent = cosine / tau + tl.load(bias + key, mask=inside, other=0.0) - tl.load(other_logsumexp + row)
    # Exponents at keys of the query's class can be far above `other_logsumexp`, and exp of them would overflow.
    posterior = tl.exp(tl.where(inside & (own == 0), exponent, 0.0))
    from_own = tl.load(grad_own + row * longest + (key - first), mask=inside & own, other=0.0)
    gradient = tl.where(own, from_own, posterior * (tl.load(grad_other_gml + row) / tau))
    tl.store(grad_similarity + row * keys + key, gradient, mask=inside)


@functools.cache
def _kernels() -> tuple[Any, Any]:
    # Imported here and not at module level: Triton exists only for Linux, and its decorator reads TRITON_INTERPRET when
    # it is applied. `tl` must be a global of this module, because a kernel resolves its names there.
    global tl
    import triton
    import triton.language as tl

    return triton.jit(_other_logsumexp_kernel), triton.jit(_similarity_gradient_kernel)


class FusedOwnClassLogSumExp(torch.autograd.Function):
    """Autograd function with the fused kernels: same arguments and results as OwnClassLogSumExp of models.contrast.gml."""

    @staticmethod
    def forward(
        ctx: Any, similarity: Tensor, own_rows: Tensor, bias: Tensor, temperature: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        similarity = similarity.contiguous()
        batch, keys = similarity.shape
        own_first, own_last = own_rows[:, 0].contiguous(), own_rows[:, -1].contiguous()
        other_logsumexp, mean = similarity.new_empty(batch), similarity.new_empty(batch)
        tensors = (similarity, bias, own_first, own_last, temperature, other_logsumexp, mean)
        with torch.cuda.device_of(similarity):
            _kernels()[0][(batch,)](*tensors, keys, FLOOR, BLOCK, num_warps=8)
        ctx.save_for_backward(*tensors)
        return similarity.gather(1, own_rows), other_logsumexp, other_logsumexp.clone()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_own: Tensor, grad_other_gml: Tensor, grad_other_tau: Tensor
    ) -> tuple[Tensor | None, ...]:
        similarity, bias, own_first, own_last, temperature, other_logsumexp, mean = ctx.saved_tensors
        batch, keys = similarity.shape
        grad_similarity = grad_temperature = None
        if ctx.needs_input_grad[0]:
            grad_similarity = torch.empty_like(similarity)
            with torch.cuda.device_of(similarity):
                _kernels()[1][(batch, -(-keys // BLOCK))](
                    similarity, bias, own_first, own_last, temperature, other_logsumexp, grad_other_gml.contiguous(),
                    grad_own.contiguous(), grad_similarity, keys, grad_own.shape[1], BLOCK, num_warps=8,
                )  # fmt: skip
        if ctx.needs_input_grad[3]:
            grad_temperature = -(grad_other_tau * mean).sum() / temperature**2
        return grad_similarity, None, None, grad_temperature
