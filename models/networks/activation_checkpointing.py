"""Activation checkpointing: only the input of each block is stored, and the backward pass runs the block again.

Gradients are the same, for about a third more computation. A block is an element of a sequence in a library's network:
a residual block, a transformer block, a dense block. The second run must have no further side effects, so batch norm
updates its running statistics in the first run only, and random numbers (dropout) are drawn again from the same
generator state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

SEQUENCES = (nn.Sequential, nn.ModuleList)
RANDOM = ("drop", "stochastic")  # in class names: Dropout, DropPath, StochasticDepth


class NoBlocksError(ValueError):
    """The network has no sequence of blocks that could be recomputed one by one."""


def recompute_blocks(network: nn.Module) -> int:
    """Enable activation checkpointing for every block of a network; returns the number of blocks.

    Weight names do not change. Raises NoBlocksError when the network has no sequence of blocks.
    """
    targets = list(blocks(network))
    if not targets:
        raise NoBlocksError("its network has no sequence of blocks whose activations could be recomputed one by one")
    for block in targets:
        block.forward = Recomputed(block, block.forward)
    return len(targets)


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a network, not nested: children of a sequence that are not a layer, a sequence or a stage."""
    for child in module.children():
        if isinstance(module, SEQUENCES) and _is_block(child) and not _is_stage(child):
            yield child
        else:
            yield from blocks(child)


def _is_block(module: nn.Module) -> bool:
    return (
        not isinstance(module, SEQUENCES)
        and any(True for _ in module.children())
        and any(True for _ in module.parameters())
    )


def _is_stage(module: nn.Module) -> bool:
    """Whether a module contains a sequence of blocks of the same type, such as a stage of a ConvNeXt."""
    rows = (inner for inner in module.modules() if isinstance(inner, SEQUENCES))
    kinds = ([type(child) for child in row.children() if _is_block(child)] for row in rows)
    return any(len(types) > len(set(types)) for types in kinds)


def _draws(layer: nn.Module) -> bool:
    """Whether a layer draws random numbers: dropout and stochastic depth, unless they drop nothing."""
    share = next((getattr(layer, name) for name in ("p", "drop_prob") if hasattr(layer, name)), 1.0)
    return bool(share) and any(word in type(layer).__name__.lower() for word in RANDOM)


class Recomputed:
    """Replacement of a block's forward with checkpointing; calls the plain forward in evaluation and without gradients."""

    def __init__(self, block: nn.Module, forward: Callable[..., Any]) -> None:
        self.block = block
        self.forward = forward
        # The generator state cannot be read while a CUDA graph is captured, and it is needed only with random layers.
        self.random = any(_draws(layer) for layer in block.modules())

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """Run the block."""
        if not (self.block.training and torch.is_grad_enabled()):
            return self.forward(*inputs, **options)
        return checkpoint(
            self.forward,
            *inputs,
            use_reentrant=False,
            preserve_rng_state=self.random,
            context_fn=lambda: (contextlib.nullcontext(), _preserve_batch_norm_statistics(self.block)),
            **options,
        )


@contextlib.contextmanager
def _preserve_batch_norm_statistics(block: nn.Module) -> Iterator[None]:
    """Run batch norm on copies of its running statistics, which are discarded after the block."""
    saved = [(layer, dict(layer._buffers)) for layer in block.modules() if isinstance(layer, _NormBase)]
    for layer, buffers in saved:
        layer._buffers.update({name: None if value is None else value.clone() for name, value in buffers.items()})
    try:
        yield
    finally:
        for layer, buffers in saved:
            layer._buffers.update(buffers)
