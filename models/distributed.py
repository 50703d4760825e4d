"""Collective operations over the ranks that share a batch: gather, sum, mean, gradients, synchronised batch norm.

In a single process nothing here changes its input. The processes are started elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def rank_count() -> int:
    """Number of ranks that share a batch; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Rank of this process, from 0."""
    return dist.get_rank() if rank_count() > 1 else 0


@torch.no_grad()
def gather_batch(share: Tensor) -> Tensor:
    """Gather the whole batch from the equal shares of all ranks: [b, ...] → [ranks*b, ...], in rank order. No gradient."""
    if rank_count() == 1:
        return share
    shares = [torch.empty_like(share) for _ in range(rank_count())]
    dist.all_gather(shares, share.contiguous())
    return torch.cat(shares)


def gather_with_gradient(share: Tensor) -> Tensor:
    """As `gather_batch`, but differentiable: each rank gets the sum over all ranks of the gradients of its share.

    For a loss that is a mean over the ranks and whose gradients `average_gradients` averages, that is the gradient of
    the whole batch.
    """
    if rank_count() == 1:
        return share
    gathered: Tensor = _GatherOverRanks.apply(share)
    return gathered


@torch.no_grad()
def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum of a tensor over the ranks; the tensor itself in a single process. No gradient."""
    if rank_count() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total


def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean of a tensor over the ranks; the tensor itself in a single process. No gradient."""
    return value if rank_count() == 1 else sum_over_ranks(value) / rank_count()


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Average the gradients of all ranks in place, in one all-reduce for all parameters; does nothing in a single process."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if rank_count() == 1 or not gradients:
        return
    together = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(together)
    parts = (together / rank_count()).split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def synchronise_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """Replace every batch norm by one that uses the statistics of the whole batch. No change in a single process.

    timm's batch norm includes an activation. The replacement applies it too.
    """
    if rank_count() == 1:
        return module
    if device.type == "cuda":
        convert: Any = nn.SyncBatchNorm.convert_sync_batchnorm
        if any(isinstance(layer, nn.BatchNorm2d) and hasattr(layer, "act") for layer in module.modules()):
            from timm.layers.norm_act import convert_sync_batchnorm

            convert = convert_sync_batchnorm  # PyTorch's function would drop the activation
        converted: nn.Module = convert(module)
        return converted
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            setattr(module, name, SharedBatchNorm.of(child))
        else:
            synchronise_batch_norm(child, device)
    return module


class SharedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Synchronised batch norm on the CPU, where torch.nn.SyncBatchNorm is not supported.

    Inputs of at least 2 dimensions. drop, act: dropout and activation of timm's batch norm, applied to
    the normalised values.
    """

    drop: nn.Module
    act: nn.Module

    @classmethod
    def of(cls, original: nn.modules.batchnorm._BatchNorm) -> SharedBatchNorm:
        """Create the layer from a batch norm; parameters and running statistics are shared with it."""
        layer = cls(
            original.num_features, original.eps, original.momentum, original.affine, original.track_running_stats
        )
        layer.weight, layer.bias = original.weight, original.bias
        layer.running_mean, layer.running_var = original.running_mean, original.running_var
        layer.num_batches_tracked = original.num_batches_tracked
        layer.drop, layer.act = (getattr(original, name, nn.Identity()) for name in ("drop", "act"))
        return layer.train(original.training)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected an input of at least 2 dimensions, got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise input [N,C,...]; in training by the mean and variance of the samples of all ranks."""
        activated: Tensor = self.act(self.drop(self._normalised(input)))
        return activated

    def _normalised(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        axes = [axis for axis in range(input.dim()) if axis != 1]
        count = input.numel() // input.shape[1] * rank_count()
        shape = [1, -1] + [1] * (input.dim() - 2)
        mean = _SumOverRanks.apply(input.sum(axes)) / count
        centred = input - mean.view(shape)
        variance = _SumOverRanks.apply(centred.square().sum(axes)) / count
        with torch.no_grad():
            tracked = self.get_buffer("num_batches_tracked").add_(1)
            # As in PyTorch: without a momentum, the running statistics are the plain mean over all batches.
            momentum = 1 / float(tracked) if self.momentum is None else self.momentum
            self.get_buffer("running_mean").lerp_(mean, momentum)
            self.get_buffer("running_var").lerp_(variance * count / max(count - 1, 1), momentum)
        scale = self.weight / torch.sqrt(variance + self.eps)
        normalised: Tensor = centred * scale.view(shape) + self.bias.view(shape)
        return normalised


class _SumOverRanks(torch.autograd.Function):
    """Differentiable sum over the ranks.

    Every rank uses the sum, so its gradient is the sum of the gradients of all ranks.
    """

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:  # noqa: ARG004 - autograd passes it
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004 - autograd passes it
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class _GatherOverRanks(torch.autograd.Function):
    """Differentiable `gather_batch`."""

    @staticmethod
    def forward(context: Any, share: Tensor) -> Tensor:
        context.rows = len(share)
        return gather_batch(share)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        first: int = rank() * context.rows
        return sum_over_ranks(gradient)[first : first + context.rows]
