"""Record the live tensor memory of an operation by kind, and its peak; works with real and with fake tensors."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TEMPORARY = "temporary"
GRADIENTS = "gradients"


class LiveMemory(TorchDispatchMode):
    """Dispatch mode that records each storage from its allocation to its release.

    peak: largest number of live bytes; at_peak: these by kind; largest: maximum of each kind, not all at the same time.
    A storage is `temporary` until `declare` names its kind, it is saved for the backward pass within
    `label_saved_tensors`, or it becomes a gradient. Workspaces that kernels allocate internally are not recorded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes: Counter[str] = Counter()
        self.peak = 0
        self.at_peak: dict[str, int] = {}
        self.largest: Counter[str] = Counter()
        self._kinds: dict[int, str] = {}

    def declare(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Record tensors as `kind`; tensors that are recorded already keep their kind."""
        for tensor in tensors:
            self._record(tensor, kind)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and record its outputs."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._record(leaf, TEMPORARY)
        return out

    @contextlib.contextmanager
    def label_saved_tensors(self, kind_of: Callable[[Tensor], str]) -> Iterator[None]:
        """Context manager in which tensors that autograd saves for the backward pass get the kind `kind_of(tensor)`."""

        def label(tensor: Tensor) -> Tensor:
            self._relabel(tensor, kind_of)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(label, lambda tensor: tensor):
            yield

    def follow_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Record the gradients of parameters as `gradients` when they are accumulated."""
        for parameter in parameters:
            if parameter.requires_grad:
                # type: ignore: a gradient is never None in this hook, which runs after its accumulation.
                parameter.register_post_accumulate_grad_hook(
                    lambda weight: self._relabel(weight.grad, lambda _: GRADIENTS)  # type: ignore[arg-type]
                )

    def _record(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._kinds:
            return
        size = storage.nbytes()
        self._kinds[key] = kind
        self._add(kind, size)
        weakref.finalize(storage, self._release, key, size)

    def _relabel(self, tensor: Tensor, kind_of: Callable[[Tensor], str]) -> None:
        storage = tensor.untyped_storage()
        if self._kinds.get(storage._cdata) == TEMPORARY:
            kind = self._kinds[storage._cdata] = kind_of(tensor)
            self.live_bytes[TEMPORARY] -= storage.nbytes()
            self._add(kind, storage.nbytes())

    def _add(self, kind: str, size: int) -> None:
        self.live_bytes[kind] += size
        self.largest[kind] = max(self.largest[kind], self.live_bytes[kind])
        total = self.live_bytes.total()
        if total >= self.peak:
            self.peak, self.at_peak = total, dict(self.live_bytes)

    def _release(self, key: int, size: int) -> None:
        self.live_bytes[self._kinds.pop(key)] -= size
