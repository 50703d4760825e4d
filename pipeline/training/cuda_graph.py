"""CUDA graph of a whole training step: hundreds of small kernels are launched at once, without Python between them.

A graph replays the recorded kernels on the memory addresses of the recording. Therefore the inputs of a step are copied
into the tensors of the example. Before use, one replay is compared with the plain step from the same state.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.training.step import Step, StepInputs

WARM_UP = 3  # steps on a side stream before the capture, for one-time allocations of libraries
# A replay runs the same kernels, but atomic additions in another order change the sums slightly.
CLOSE = {"rtol": 1e-2, "atol": 1e-3}

Parts = dict[str, Tensor]
Recorder = Callable[[Callable[[], Parts]], tuple[Callable[[], None], Parts]]


class CaptureError(Exception):
    """The step cannot be captured or its replay differs, as the message states; train with the plain step instead."""


def cuda_graph(work: Callable[[], Parts]) -> tuple[Callable[[], None], Parts]:
    """Record work() as a CUDA graph; returns the replay function and the result tensors, which each replay overwrites."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            parts = work()
    except RuntimeError:
        torch.cuda.set_stream(current)  # PyTorch leaves the stream of a failed recording as the current one
        raise
    return graph.replay, parts


class CapturedStep:
    """A training step that replays a CUDA graph of `step`; creating it leaves state and random numbers of the run unchanged.

    The tensors that a call returns are overwritten by the next call. Raises CaptureError.
    """

    def __init__(self, step: Step, example: StepInputs, record: Recorder = cuda_graph) -> None:
        self._device = step.device
        on_device = example.to(step.device)
        # Cloned, because `to` may return the caller's tensors, and each call overwrites these.
        self._inputs = [tensor.clone() for tensor in on_device.tensors()]
        static = rebuilt(on_device, self._inputs)
        before = {name: tensor.clone() for name, tensor in step.state().items()}
        numbers = random_state(step.device)
        expected = {name: part.clone() for name, part in step(static).items()}
        after = {name: tensor.clone() for name, tensor in step.state().items()}
        step.load_state(before)
        try:
            self._replay, self._parts = record(lambda: step(static))
            # The warm-up steps have changed the state; the replay must start where `expected` started, also with dropout.
            step.load_state(before)
            set_random_state(step.device, numbers)
            self._replay()
            different = differing(expected, self._parts) + differing(after, step.state())
        except RuntimeError as error:  # torch raises it for an operation that a graph cannot record
            raise CaptureError(" ".join(str(error).split())[:200]) from None
        finally:
            step.load_state(before)
            set_random_state(step.device, numbers)
        if different:
            raise CaptureError(f"its replay gives another {different[0]}")

    def __call__(self, inputs: StepInputs) -> Parts:
        """Run the step on inputs on any device, with the shapes of the example."""
        # `to` copies through pinned memory: a copy from pageable memory would wait for the device.
        for static, tensor in zip(self._inputs, inputs.to(self._device).tensors(), strict=True):
            static.copy_(tensor)
        self._replay()
        return self._parts


def random_state(device: torch.device) -> Tensor:
    """State of a device's random numbers."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_random_state(device: torch.device, state: Tensor) -> None:
    """Continue a device's random numbers from a state of `random_state`."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def rebuilt(inputs: StepInputs, tensors: list[Tensor]) -> StepInputs:
    """StepInputs like the given ones but with other tensors, in the order of `StepInputs.tensors`."""
    remaining = iter(tensors)
    chosen = next(remaining)
    draws = type(inputs.draws)(tuple(next(remaining) for _ in inputs.draws.tables))
    mix = inputs.mix
    if mix is not None:
        mix = type(mix)(next(remaining), next(remaining), None if mix.box is None else next(remaining))
    return StepInputs(chosen, draws, mix, next(remaining, None))


def differing(expected: dict[str, Tensor], actual: dict[str, Tensor]) -> list[str]:
    """Names of tensors that differ: integers exactly, floats by more than rounding; a non-finite value equals itself."""
    return [
        name
        for name, tensor in expected.items()
        if not (
            torch.allclose(tensor, actual[name], equal_nan=True, **CLOSE)
            if tensor.is_floating_point()
            else torch.equal(tensor, actual[name])
        )
    ]
