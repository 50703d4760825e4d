"""The two sides of benchmarks.training: the work of one round for each row of its table."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks import plain_training as plain
from benchmarks.training_setup import Setup, objective_of
from benchmarks.turns import Turn, Work
from pipeline.augment import apply_views, draw_views
from pipeline.data.dataset import Normalisation
from pipeline.shared.host_memory import keep_freed_memory
from pipeline.training.cuda_graph import CapturedStep
from pipeline.training.engine import Training
from pipeline.training.step import Step, StepInputs, precision_of

CLOSE = 1e-9  # in float64


def baseline_side(setup: Setup) -> dict[str, Work]:
    """Return the baseline's work by row."""
    device, image, cuda = setup.device, setup.params.image, setup.device.type == "cuda"
    torch.backends.cudnn.benchmark = cuda

    def loader(name: str) -> plain.DataLoader:
        views = 3 if name == "student" else 1
        return plain.training_loader(setup.train, getattr(setup.params, name), image, views, setup.workers, cuda)

    def trained(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
        objective = objective_of(setup, name)
        plainly = plain.PlainTeacher if name == "teacher" else plain.PlainStudent
        module = plainly(objective).to(device)
        return module, plain.plain_optimiser(module, getattr(setup.params, name))

    def views(rounds: int, turn: Turn) -> None:
        batches = loader("student")
        for _ in range(rounds):
            for tensors, _target, _indexes in batches:
                for tensor in tensors:
                    tensor.to(device, non_blocking=True)
            turn()

    def steps(name: str, rounds: int, turn: Turn) -> None:
        module, optimiser = trained(name)
        ready = list(loader(name))
        for _ in range(rounds):
            plain.train_epoch(module, ready, optimiser, device)
            turn()

    def epochs(name: str, rounds: int, turn: Turn) -> None:
        module, optimiser = trained(name)
        batches, test = loader(name), plain.test_loader(setup.test, image, setup.workers, cuda)
        for _ in range(rounds):
            plain.train_epoch(module, batches, optimiser, device)
            plain.test_accuracy(module, test, device)
            turn()

    return rows(views, steps, epochs)


def engine_side(setup: Setup) -> dict[str, Work]:
    """Return the engine's work by row."""
    device, image, engine = setup.device, setup.params.image, setup.params.engine
    if device.type == "cpu":
        keep_freed_memory()

    def prepared(name: str) -> tuple[Step, list[Tensor], torch.Generator]:
        params, objective = getattr(setup.params, name), objective_of(setup, name)
        objective.to(device, memory_format=torch.channels_last)
        step = Step(objective, params, image, setup.train, device, precision_of(engine, device))
        return step, list(torch.arange(len(setup.train)).split(params.batch_size)), torch.Generator().manual_seed(0)

    def views(rounds: int, turn: Turn) -> None:
        step, batches, generator = prepared("student")
        normalised = Normalisation(image, device)
        for _ in range(rounds):
            for chosen in batches:
                normalised(step.views(step.draw(chosen, generator).to(device))[0])
            turn()

    def steps(name: str, rounds: int, turn: Turn) -> None:
        step, batches, generator = prepared(name)

        def plainly(inputs: StepInputs) -> dict[str, Tensor]:
            return step(inputs.to(device))

        take = (
            CapturedStep(step, step.draw(batches[0], generator))
            if device.type == "cuda" and engine.capture
            else plainly
        )
        for _ in range(rounds):
            for chosen in batches:
                take(step.draw(chosen, generator))
            turn()

    def epochs(name: str, rounds: int, turn: Turn) -> None:
        params = getattr(setup.params, name).model_copy(update={"epochs": rounds})
        training = Training(
            name, objective_of(setup, name), params, image, 0, device, engine=engine, on_epoch=lambda _history: turn()
        )
        training.run(setup.train, setup.test)

    return rows(views, steps, epochs)


def rows(
    views: Work, steps: Callable[[str, int, Turn], None], epochs: Callable[[str, int, Turn], None]
) -> dict[str, Work]:
    """Return the work by row of the table, in its order."""
    by_stage = {
        f"{name} {kind}": functools.partial(work, name)
        for kind, work in (("step", steps), ("epoch", epochs))
        for name in ("teacher", "student")
    }
    return {"views alone": views, **by_stage}


SIDES = {"baseline": baseline_side, "engine": engine_side}


def difference(setup: Setup) -> float:
    """Return the largest relative difference of the two sides' losses and gradients on the same views and weights.

    In float64, where rounding differences are far below those of a different computation. Raises AssertionError when
    the sides differ by more than CLOSE.
    """
    device, count = setup.device, 32
    generator = torch.Generator().manual_seed(0)
    images = setup.train.images[:count].to(device)
    augment = setup.params.student.augment
    draws = draw_views(len(images), *images.shape[2:], 3, augment, generator)
    views = apply_views(images, draws.to(images.device), augment)
    views = Normalisation(setup.params.image, device)(views).double()
    target, ids = setup.train.labels[:count].to(device), torch.arange(count, device=device)
    engine = objective_of(setup, "student").to(device).double()
    with torch.no_grad():
        engine.teacher.train()(views[0])  # batch statistics other than the initial ones
    baseline = plain.PlainStudent(engine).to(device)
    actual = engine.to(memory_format=torch.channels_last).train()(views, target, ids)
    expected, _ = baseline.train().loss_parts(list(views), target, ids)
    actual["loss"].backward()
    expected["loss"].backward()
    losses = [(actual[name].detach(), value.detach()) for name, value in expected.items()]
    gradients = [
        (ours.grad, theirs.grad)
        for a, b in ((getattr(engine, part), getattr(baseline, part)) for part in ("model", "query_head", "key_head"))
        for ours, theirs in zip(a.parameters(), b.parameters(), strict=True)
    ]
    gradients.append((engine.log_tau_g.grad, baseline.log_tau_g.grad))
    worst = max(
        max((a - b).abs().max().item() for a, b in pairs) / max(b.abs().max().item() for _, b in pairs)
        for pairs in (losses, gradients)
    )
    if not worst < CLOSE:
        raise AssertionError(f"baseline and engine differ by {worst:.1e}; they must do the same work")
    return worst
