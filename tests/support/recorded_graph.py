"""Stand-in of a CUDA graph on the CPU: records the operations of a step and repeats them on the same tensors.

Like a graph it repeats no Python: a number that the step computed in Python keeps its value, and a tensor that Python
would replace stays the recorded one. It refuses what a graph cannot record, so that tests find it without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# These read a value on the host, or make a tensor whose shape depends on values.
REFUSED = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive",
    "bincount", "repeat_interleave",
}  # fmt: skip
Call = tuple[Any, tuple[Any, ...], dict[str, Any], list[tuple[int, Tensor]]]


class Operations(TorchDispatchMode):
    """Keeps every operation of its context with its arguments, and the tensors that it makes with their place in its result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run and keep an operation. RuntimeError, as of a CUDA stream in capture, for one that a graph cannot record."""
        name = function._schema.name.removeprefix("aten::")
        by_mask = name.startswith("index") and any(tensor.dtype == torch.bool for tensor in tensors(args[1]))
        if (name in REFUSED and "self_int" not in function._schema.overload_name) or by_mask:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        result = function(*args, **(kwargs or {}))
        # A view, or an operation in place, has the memory of an argument.
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors((args, kwargs))}
        places = enumerate(tensors(result))
        made = [(place, tensor) for place, tensor in places if tensor.untyped_storage().data_ptr() not in given]
        if made or function._schema.is_mutable:
            self.calls.append((function, args, kwargs or {}, made))
        return result

    def repeat(self) -> None:
        """Run the operations again on the tensors of the recording."""
        for function, args, kwargs, made in self.calls:
            again = tensors(function(*args, **kwargs))
            for place, tensor in made:
                tensor.copy_(again[place])


def tensors(tree: Any) -> list[Tensor]:
    """The tensors in nested arguments."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def one_hot(index: Tensor, classes: int) -> Tensor:
    """F.one_hot as on CUDA, where it reads no value; on the CPU it checks the range of the index."""
    return (index[..., None] == torch.arange(classes, device=index.device)).long()


def recorded_graph(work: Callable[[], dict[str, Tensor]]) -> tuple[Callable[[], None], dict[str, Tensor]]:
    """Record work() like `pipeline.training.cuda_graph.cuda_graph`, on the CPU."""
    for _ in range(2):  # the warm-up
        work()
    with mock.patch("torch.nn.functional.one_hot", one_hot), Operations() as operations:
        parts = work()

    def replay() -> None:
        with torch.no_grad():
            operations.repeat()

    return replay, parts
