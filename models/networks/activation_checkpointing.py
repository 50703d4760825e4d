"""Activation checkpointing: of each block of a network only the input is kept, and the backward pass runs the block again.

The same gradients for about a third more arithmetic. A block is what a library puts in a row: a residual block, a
transformer block, a dense block. What runs twice must leave the same behind as what runs once, so batch norm updates its
running statistics in the first pass alone, and random numbers (dropout) are drawn again from the state of then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

ROWS = (nn.Sequential, nn.ModuleList)
RANDOM = ("drop", "stochastic")  # in the name of a layer's class: Dropout, DropPath, StochasticDepth


class NoBlocksError(ValueError):
    """A network without a row of blocks; there is nothing that could be recomputed one by one."""


def recompute_blocks(network: nn.Module) -> int:
    """Let every block of a network be recomputed in the backward pass; how many there are. Names of weights stay.

    Raises NoBlocksError when the network has no row of blocks.
    """
    found = list(blocks(network))
    if not found:
        raise NoBlocksError("its network has no row of blocks whose activations could be recomputed one by one")
    for block in found:
        block.forward = Recomputed(block, block.forward)
    return len(found)


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a network, none inside another: what stands in a row and is no layer, no row and no stage itself."""
    for child in module.children():
        if isinstance(module, ROWS) and _is_block(child) and not _is_stage(child):
            yield child
        else:
            yield from blocks(child)


def _is_block(module: nn.Module) -> bool:
    return (
        not isinstance(module, ROWS) and any(True for _ in module.children()) and any(True for _ in module.parameters())
    )


def _is_stage(module: nn.Module) -> bool:
    """Whether there is a row of like blocks inside, as in a stage of a ConvNeXt."""
    rows = (inner for inner in module.modules() if isinstance(inner, ROWS))
    kinds = ([type(child) for child in row.children() if _is_block(child)] for row in rows)
    return any(len(found) > len(set(found)) for found in kinds)


class Recomputed:
    """Stands in the place of a block's forward. Plain in evaluation and where no gradient is asked for."""

    def __init__(self, block: nn.Module, forward: Callable[..., Any]) -> None:
        self.block = block
        self.forward = forward
        # The state of a generator cannot be read while a CUDA graph is recorded; without random layers nobody needs it.
        self.random = any(word in type(layer).__name__.lower() for layer in block.modules() for word in RANDOM)

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """What the block gives."""
        if not (self.block.training and torch.is_grad_enabled()):
            return self.forward(*inputs, **options)
        return checkpoint(
            self.forward,
            *inputs,
            use_reentrant=False,
            preserve_rng_state=self.random,
            context_fn=lambda: (contextlib.nullcontext(), _statistics_kept(self.block)),
            **options,
        )


@contextlib.contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Batch norm does what it always does, but on copies of its running statistics, which are thrown away."""
    kept = [(layer, dict(layer._buffers)) for layer in block.modules() if isinstance(layer, _NormBase)]
    for layer, buffers in kept:
        layer._buffers.update({name: None if value is None else value.clone() for name, value in buffers.items()})
    try:
        yield
    finally:
        for layer, buffers in kept:
            layer._buffers.update(buffers)
