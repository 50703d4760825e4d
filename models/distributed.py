"""What the mathematics needs of other processes when a batch is shared by several: gathered batches, common statistics.

Everything here is the identity in a single process. Knows nothing of how the processes were started.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def rank_count() -> int:
    """Processes that share a batch; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's place among them, from 0."""
    return dist.get_rank() if rank_count() > 1 else 0


@torch.no_grad()
def gather_batch(share: Tensor) -> Tensor:
    """The whole batch from every rank's equal share [b, ...] → [ranks*b, ...], in rank order. No gradient."""
    if rank_count() == 1:
        return share
    shares = [torch.empty_like(share) for _ in range(rank_count())]
    dist.all_gather(shares, share.contiguous())
    return torch.cat(shares)


@torch.no_grad()
def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum of a tensor over the ranks; its own value in a single process. No gradient."""
    if rank_count() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total


def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean of a tensor over the ranks; its own value in a single process. No gradient."""
    return value if rank_count() == 1 else sum_over_ranks(value) / rank_count()


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Average the gradients of all ranks in place; nothing in a single process. In one message, whatever their number."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if rank_count() == 1 or not gradients:
        return
    together = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(together)
    parts = (together / rank_count()).split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def synchronise_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """Replace every batch norm by one whose statistics are those of the whole batch; nothing changes in a single process."""
    if rank_count() == 1:
        return module
    if device.type == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        return converted
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            setattr(module, name, SharedBatchNorm.of(child))
        else:
            synchronise_batch_norm(child, device)
    return module


class SharedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over all ranks for the CPU, where PyTorch's own SyncBatchNorm refuses to run. Any rank >= 2 input."""

    @classmethod
    def of(cls, original: nn.modules.batchnorm._BatchNorm) -> SharedBatchNorm:
        """The same layer, parameters and running statistics shared with the original."""
        layer = cls(
            original.num_features, original.eps, original.momentum, original.affine, original.track_running_stats
        )
        layer.weight, layer.bias = original.weight, original.bias
        layer.running_mean, layer.running_var = original.running_mean, original.running_var
        layer.num_batches_tracked = original.num_batches_tracked
        return layer.train(original.training)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected an input of at least 2 dimensions, got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        """input [N,C,...] → normalised by the mean and variance of every rank's samples together while training."""
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
            # PyTorch's own rule: without a momentum, the plain mean of all batches.
            momentum = 1 / float(tracked) if self.momentum is None else self.momentum
            self.get_buffer("running_mean").lerp_(mean, momentum)
            self.get_buffer("running_var").lerp_(variance * count / max(count - 1, 1), momentum)
        scale = self.weight / torch.sqrt(variance + self.eps)
        normalised: Tensor = centred * scale.view(shape) + self.bias.view(shape)
        return normalised


class _SumOverRanks(torch.autograd.Function):
    """Sum of a tensor over the ranks; the gradient of a sum that every rank uses is the sum of the ranks' gradients."""

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
