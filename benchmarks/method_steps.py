"""Cost of a training step of each contrast method beside that of its networks alone, and the cost goals.

    python -m benchmarks.methods --steps

A step of CIFAR-100-LT at imbalance factor 100 (ResNet-32, teacher ResNet-56, batch 64) on finished views, one thread, CPU
seconds. `networks`: forward and backward of the images that go through the networks, alone, in the same run. The rest of the
step is what the method itself costs: losses, heads, memory, optimiser. Goal: no contrast method is slower than GML by more
than its extra images, which is a rest not above that of GML. CRD must not make a tensor of B x (K+1) x D values, and ProCo
must be loop-free: the same number of operations whatever the classes and the size of the batch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.machine import hardware, versions
from models.contrast.crd import CRD
from models.contrast.proco import class_logits
from models.prior import class_prior, log_class_prior
from pipeline.data.class_prior import Prior
from pipeline.data.dataset import Images
from pipeline.data.profiles import class_sizes
from pipeline.methods.catalogue import CONTRAST, METHODS, Method, params_of
from pipeline.params import PARAMS_FILE, Params, parse_params
from pipeline.params.recipe import RECIPES, apply_recipe
from pipeline.preparation.gpu_memory import new_objective
from pipeline.training.step import Step

RECIPE = "cifar100-if100-200.yaml"
REFERENCE = "gml"
NOISE = 0.05  # of a step; a rest above that of GML by less is no difference
ROUNDS = 5


class Operations(TorchDispatchMode):
    """Counts the operations on tensors within its context; size of the largest tensor that they make, in float32 values."""

    def __init__(self) -> None:
        super().__init__()
        self.number, self.largest = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count it."""
        result = function(*args, **(kwargs or {}))
        given = {each.untyped_storage().data_ptr() for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        made = [each.untyped_storage() for each in tree_leaves(result) if isinstance(each, Tensor)]
        self.number += 1
        # The result of a view or of an operation in place shares the storage of an input.
        self.largest = max([self.largest, *(each.nbytes() // 4 for each in made if each.data_ptr() not in given)])
        return result


def crd_largest_tensor(batch: int, negatives: int, dim: int, images: int) -> int:
    """Size in float32 values of the largest tensor that a forward and backward pass of CRD makes."""
    term = CRD(dim, dim, torch.arange(images) % 2, dim=dim, negatives=negatives)
    anchors = [nn.functional.normalize(torch.randn(batch, dim), dim=1).requires_grad_() for _ in range(2)]
    with Operations() as operations:
        rows = torch.cat([torch.arange(batch)[:, None], term.draw(torch.arange(batch) % 2)], 1)
        term.losses(anchors[0], anchors[1], rows).mean().backward()
    return operations.largest


def proco_operations(batch: int, classes: int, dim: int) -> int:
    """Number of operations of a forward and backward pass of ProCo's class logits."""
    query = nn.functional.normalize(torch.randn(batch, dim), dim=1).requires_grad_()
    means = 0.5 * nn.functional.normalize(torch.randn(classes, dim), dim=1)
    with Operations() as operations:
        class_logits(query, means, 0.1).sum().backward()
    return operations.number


@dataclass
class Timed:
    """A step of a method and its networks alone, with the CPU seconds of each round."""

    method: Method
    step: Callable[[], object]
    networks: Callable[[], object]
    step_seconds: list[float]
    network_seconds: list[float]

    @property
    def rest(self) -> list[float]:
        """Seconds of a step without its networks, of each round."""
        return [step - networks for step, networks in zip(self.step_seconds, self.network_seconds, strict=True)]


def recipe() -> tuple[Params, Prior]:
    """Params of the recipe and its class prior."""
    from ruamel.yaml import YAML

    content = YAML(typ="safe").load(apply_recipe([RECIPES / RECIPE], PARAMS_FILE)[0])
    params = parse_params(content, PARAMS_FILE)
    counts = class_sizes("exponential", [500] * 100, 100)
    prior = class_prior(counts, 0.0).tolist()
    return params, Prior([str(c) for c in range(100)], counts, prior, log_class_prior(counts).tolist(), ["many"] * 100)


def timed(method: Method, params: Params, prior: Prior) -> Timed:
    """The step of a method on random views, and its networks alone on as many images."""
    made, image = params_of(method, params), params.image
    section = made.student
    objective = new_objective(made, "student", prior).to(memory_format=torch.channels_last)
    objective.begin_epoch(1, 2)
    empty = Images(torch.zeros(0, 3, image.size, image.size, dtype=torch.uint8), torch.zeros(0).long(), [], [], None)
    step = Step(objective, section, image, empty, torch.device("cpu"))
    batch = section.batch_size * (1 if objective.companion is None else 2)
    views = torch.randint(256, (objective.views, batch, 3, image.size, image.size), dtype=torch.uint8)
    target, chosen = torch.multinomial(torch.tensor(prior.p), batch, replacement=True), torch.arange(batch)
    images = torch.randn(method.trained * section.batch_size, 3, image.size, image.size)
    images = images.contiguous(memory_format=torch.channels_last)
    other = getattr(objective, "momentum_encoder", None) or getattr(objective, "teacher", None)

    def networks() -> None:
        objective.model(images)[1].sum().backward()
        with torch.no_grad():
            for _ in range(method.forward):
                other(images[: section.batch_size])

    return Timed(method, lambda: step.descend(views, target, chosen, None), networks, [], [])


def measure(rounds: int = ROUNDS) -> list[Timed]:
    """Time every contrast method, one step of each in a round, after a round of warm-up."""
    torch.manual_seed(0)
    params, prior = recipe()
    methods = [method for method in METHODS if method.kind == CONTRAST and not method.name.endswith("_encoder")]
    sides = [timed(method, params, prior) for method in methods]
    for number in range(rounds + 1):
        for side in sides:
            for run, seconds in ((side.step, side.step_seconds), (side.networks, side.network_seconds)):
                started = time.process_time()
                run()
                if number:
                    seconds.append(time.process_time() - started)
    return sides


def table(sides: list[Timed]) -> str:
    """The table of steps with the verdict of each method, and the two further goals."""
    reference = next(side for side in sides if side.method.name == REFERENCE)
    allowed = statistics.median(reference.rest) + NOISE * statistics.median(reference.step_seconds)
    lines = [
        "| method | images | step, ms | networks, ms | rest, ms | rest, range | goal |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for side in sides:
        step, networks, rest = map(statistics.median, (side.step_seconds, side.network_seconds, side.rest))
        spread = f"{1000 * min(side.rest):.0f} to {1000 * max(side.rest):.0f}"
        verdict = "reference" if side is reference else "met" if rest <= allowed else "missed"
        cells = [
            f"`{side.method.name}`",
            side.method.step,
            *(f"{1000 * value:.0f}" for value in (step, networks, rest)),
            spread,
        ]
        lines.append(f"| {' | '.join(cells)} | {verdict} |")
    batch, negatives, dim, images = 64, 16384, 128, 10847
    largest, limit = crd_largest_tensor(batch, negatives, dim, images), batch * (negatives + 1) * dim
    counts = {proco_operations(*sizes, dim) for sizes in ((8, 10), (64, 10), (8, 1000))}
    lines += [
        "",
        f"CRD, B {batch}, K {negatives}, D {dim}, {images} images: the largest tensor has the size of {largest:,} float32 "
        f"values, B x (K+1) x D is {limit:,}: {'met' if largest <= limit // dim * 2 else 'missed'}.",
        f"ProCo, D {dim}: {' or '.join(map(str, sorted(counts)))} operations for 10 and 1,000 classes, batches of 8 and 64: "
        f"{'loop-free, met' if len(counts) == 1 else 'missed'}.",
    ]
    return "\n".join(lines)


def report(rounds: int = ROUNDS) -> str:
    """The table with the machine."""
    torch.set_num_threads(1)
    return f"{hardware('cpu')}; {versions(1)}; medians of {rounds} rounds\n\n{table(measure(rounds))}\n"
