"""Checks of a training step for a GPU, without one: a captured step does what the plain one does, and all is on one device."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from models.objectives.objective import Objective
from pipeline.data.dataset import AnyImages
from pipeline.params import ImageParams, TrainingParams
from pipeline.training.cuda_graph import CapturedStep
from pipeline.training.step import Step, StepInputs
from tests.support.recorded_graph import recorded_graph, tensors

CUDA = torch.device("cuda", 0)
EPOCHS = 3


class OneDevice(TorchDispatchMode):
    """Refuses an operation with tensors of two devices: a copy from the host, or a number of the host that a graph freezes."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation; AssertionError if it has two devices."""
        result = function(*args, **(kwargs or {}))
        devices = {tensor.device.type for tensor in tensors((args, kwargs, result))}
        # `x[0] = 1` fills with a number that Python put into a tensor.
        assert len(devices) < 2 or function is torch.ops.aten.fill_.Tensor, f"{function} on {sorted(devices)}"
        return result


def drawn(step: Step, images: int, batch: int) -> Iterator[StepInputs]:
    """Inputs of steps, without end."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield step.draw(torch.randperm(images, generator=generator)[:batch], generator)


def check_capture(
    monkeypatch: pytest.MonkeyPatch, plain: Step, captured: Step, section: TrainingParams, images: int
) -> None:
    """Train two steps with equal state for some epochs, one as a graph that was recorded before the first as in the engine."""
    monkeypatch.setattr("pipeline.augment.operations.computes_all_rows", lambda _: True)  # as on CUDA
    inputs = drawn(plain, images, section.batch_size)
    numbers = torch.get_rng_state()
    graph = CapturedStep(captured, next(inputs), recorded_graph)
    assert torch.equal(torch.get_rng_state(), numbers)
    for epoch, number in itertools.product(range(EPOCHS), range(2)):
        for step in (plain, captured):
            step.objective.begin_epoch(epoch, EPOCHS)
        results, batch = [], next(inputs)
        for run in (plain, graph):
            torch.manual_seed(number)
            results.append({name: value.item() for name, value in run(batch).items()})
        assert results[0] == results[1]
    assert [name for name, value in plain.state().items() if not torch.equal(value, captured.state()[name])] == []


def check_device(
    monkeypatch: pytest.MonkeyPatch,
    objective: Objective,
    section: TrainingParams,
    image: ImageParams,
    train: AnyImages,
    begins_epochs: bool = True,
) -> None:
    """Run a step on fake tensors, which have a device and no data: an operation on two devices, or one that needs data, fails.

    What needs a driver is left out: the backward pass, the kernel of the optimiser and pinned memory. begins_epochs: False
    for a method that computes with values between epochs.
    """
    inputs = next(drawn(Step(objective, section, image, train, torch.device("cpu")), len(train), section.batch_size))

    def backward(loss: torch.Tensor) -> None:
        assert loss.device == CUDA
        for weight in objective.parameters():
            weight.grad = torch.zeros_like(weight) if weight.requires_grad else None

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    for optimiser in (torch.optim.SGD, torch.optim.AdamW):
        monkeypatch.setattr(optimiser, "step", lambda _: None)
    monkeypatch.setattr("models.contrast.gml.kernels_supported", lambda _: False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _move(objective)
        # Without an average of the weights: fake tensors cannot be deep-copied.
        plain = section.model_copy(update={"ema_decay": 0.0})
        step = Step(objective, plain, image, train, CUDA, torch.bfloat16)
        if begins_epochs:
            objective.begin_epoch(1, EPOCHS)
        on_device = inputs.to(CUDA)
        with OneDevice():
            parts = step(on_device)
        assert {part.device for part in parts.values()} == {CUDA}
        assert {tensor.device for tensor in step.state().values()} == {CUDA}


def _move(module: nn.Module) -> None:
    """Do what `module.to(CUDA)` does, which fake tensors refuse: move parameters and buffers, and no other tensor."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = nn.Parameter(torch.empty_like(weight, device=CUDA), weight.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty_like(buffer, device=CUDA)
