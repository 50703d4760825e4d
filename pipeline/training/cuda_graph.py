"""A whole training step as one CUDA graph: hundreds of small kernels launched at once, without Python in between.

A graph replays what it recorded on the memory it recorded it on. So a step's inputs are copied into the example's
tensors, and before it is trusted a replay is compared with the plain step from the same state.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.training.step import Step, StepInputs

WARM_UP = 3  # steps on a side stream, in which libraries allocate what they will not allocate again
# The kernels are the same; sums that atomics take in another order are not.
CLOSE = {"rtol": 1e-2, "atol": 1e-3}

Parts = dict[str, Tensor]
Recorder = Callable[[Callable[[], Parts]], tuple[Callable[[], None], Parts]]


class CaptureError(Exception):
    """The step cannot be captured, or its replay does something else; the message says what. Train with the plain step."""


def cuda_graph(work: Callable[[], Parts]) -> tuple[Callable[[], None], Parts]:
    """Record work() as a CUDA graph; what replays it, and the tensors in which each replay leaves its results."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        parts = work()
    return graph.replay, parts


class CapturedStep:
    """Does what its Step does, by replay; the run's state is as it was once it has been made.

    The parts that a call gives are overwritten by the next call. Raises CaptureError.
    """

    def __init__(self, step: Step, example: StepInputs, record: Recorder = cuda_graph) -> None:
        self._device = step.device
        on_device = example.to(step.device)
        # Tensors of its own, whatever `to` gave.
        self._inputs = [tensor.clone() for tensor in on_device.tensors()]
        static = rebuilt(on_device, self._inputs)
        before = {name: tensor.clone() for name, tensor in step.state().items()}
        expected = {name: part.clone() for name, part in step(static).items()}
        after = {name: tensor.clone() for name, tensor in step.state().items()}
        step.load_state(before)
        try:
            self._replay, self._parts = record(lambda: step(static))
            step.load_state(before)
            self._replay()
            different = differing(expected, self._parts) + differing(after, step.state())
        except RuntimeError as error:  # what torch raises for an operation that a graph cannot hold
            raise CaptureError(" ".join(str(error).split())[:200]) from None
        finally:
            step.load_state(before)
        if different:
            raise CaptureError(f"its replay gives another {different[0]}")

    def __call__(self, inputs: StepInputs) -> Parts:
        """Take the step on inputs that lie anywhere, shaped like the example's."""
        # By way of pinned memory: a copy straight from pageable memory would wait for the device.
        for static, tensor in zip(self._inputs, inputs.to(self._device).tensors(), strict=True):
            static.copy_(tensor)
        self._replay()
        return self._parts


def rebuilt(inputs: StepInputs, tensors: list[Tensor]) -> StepInputs:
    """Inputs like the given ones over other tensors, in the order of `StepInputs.tensors`."""
    rest = iter(tensors)
    chosen = next(rest)
    draws = type(inputs.draws)(tuple(next(rest) for _ in inputs.draws.tables))
    mix = inputs.mix
    if mix is not None:
        mix = type(mix)(next(rest), next(rest), None if mix.box is None else next(rest))
    return StepInputs(chosen, draws, mix, next(rest, None))


def differing(expected: dict[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    """Names whose tensors differ: integers at all, the rest by more than rounding; what is not finite equals itself."""
    return [
        name
        for name, tensor in expected.items()
        if not (
            torch.allclose(tensor, found[name], equal_nan=True, **CLOSE)
            if tensor.is_floating_point()
            else torch.equal(tensor, found[name])
        )
    ]
