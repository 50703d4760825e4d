"""Cost of a training run and of the trained network: images through a network, multiply-accumulates, parameters."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.networks.cosine_classifier import ImageClassifier
from models.objectives.rotation import ANGLES
from pipeline.data.class_prior import Prior
from pipeline.model_io.checkpoint import build_model, load_model
from pipeline.params import Params
from pipeline.preparation.gpu_memory import fake_batch, fake_step
from pipeline.training.run import model_config

BACKWARD = 2  # a backward pass takes about twice the multiply-accumulates of the forward pass


@dataclass(frozen=True)
class Cost:
    """Cost of a training run.

    trained, forward: images through a network with and without a gradient. macs: multiply-accumulates of convolutions and
    matrix products, forward and backward.
    """

    trained: int
    forward: int
    macs: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(own + its for own, its in zip(asdict(self).values(), asdict(other).values(), strict=True)))


@dataclass(frozen=True)
class Served:
    """Size of a trained network as it is served: parameters, and multiply-accumulates for an image.

    A frozen encoder, whose features are stored, is not counted.
    """

    parameters: int
    macs: int


def training_cost(params: Params, stage: str, prior: Prior, encoder: dict[str, Any] | None) -> Cost | None:
    """Cost of training stage `teacher` or `student`, from one step on tensors without data.

    encoder: record of the encoder whose stored features are the inputs. None for a student that tunes the encoder.
    """
    if stage == "student" and params.student.tune != "none":
        return None
    section = getattr(params, stage)
    steps = sum(prior.counts) // section.batch_size * section.epochs
    with fake_step(params, stage, prior, encoder) as step, FlopCounterMode(display=False) as counter:
        images = _count_images(step.objective)
        step.descend(*fake_batch(step, params, stage, encoder), None)
    cost = Cost(images["trained"] * steps, images["forward"] * steps, counter.get_total_flops() // 2 * steps)
    return cost + _rotation_cost(params, len(prior.classes), steps) if _rotates(params, stage) else cost


def _rotates(params: Params, stage: str) -> bool:
    return stage == "student" and params.student.pretraining == "rotation"


def _rotation_cost(params: Params, classes: int, steps: int) -> Cost:
    """Cost of the pretraining by rotations."""
    section, size = params.student, params.image.size
    images = ANGLES * section.batch_size
    with torch.device("meta"):
        model = build_model(replace(model_config(section, params.image, classes), classes=ANGLES), "student.backbone")
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(images, 3, size, size))
    return Cost(images * steps, 0, counter.get_total_flops() // 2 * (1 + BACKWARD) * steps)


def _count_images(objective: nn.Module) -> dict[str, int]:
    """Counter of the images that go through the backbones of an objective, by whether they get a gradient."""
    images = {"trained": 0, "forward": 0}

    def count(_module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        images["trained" if torch.is_grad_enabled() and _module.training else "forward"] += len(inputs[0])

    backbones = [module.backbone for module in objective.modules() if isinstance(module, ImageClassifier)]
    momentum = getattr(objective, "momentum_encoder", None)
    for backbone in backbones if momentum is None else [*backbones, momentum]:
        backbone.register_forward_hook(count)
    return images


def refit_cost(record: dict[str, Any], images: int, served: Served, stored: bool) -> Cost:
    """Cost of a second stage.

    record: ModelConfig.second_stage. images: training images. served: of the network before it. stored: the features are
    those of the encoder and not computed again.
    """
    forward = 0 if stored else images * record["views"] + record["shift_images"]
    return Cost(0, forward, forward * served.macs + sum(fit["steps"] * fit["step_macs"] for fit in record["fits"]))


def served_size(folder: Path, stage: str) -> Served:
    """Size of the network in a folder."""
    model, config = load_model(folder, stage)
    features = bool(config.encoder) and config.tune == "none"
    shape = (config.encoder["width"],) if config.encoder and features else (3, config.image_size, config.image_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *shape))
    parameters = sum(weight.numel() for weight in model.parameters())
    return Served(parameters, counter.get_total_flops() // 2)


def with_macs(params: Params, costs: dict[str, Cost], macs: int) -> Params:
    """Params with other epochs, so that training costs at most `macs` multiply-accumulates.

    costs: stage → its cost with `params`. Teacher and student get the same factor, rounded down to whole epochs and at least
    one; a second stage keeps its steps, which are taken off `macs`. Each schedule is stretched with the epochs.
    """
    trained = sum(cost.macs for stage, cost in costs.items() if stage != "classifier")
    left = macs - sum(cost.macs for cost in costs.values()) + trained
    # In integers: 100 * (29 / 100) is 28.999999999999996.
    epochs = {name: getattr(params, name).epochs * left // max(trained, 1) for name in costs if name != "classifier"}
    sections = {name: _with_epochs(getattr(params, name), max(number, 1)) for name, number in epochs.items()}
    return params.model_copy(update=sections)


def _with_epochs(section: Any, epochs: int) -> Any:
    """Section teacher or student with other epochs; warm-up and milestones move to the nearest epoch."""
    factor, schedule = epochs / section.epochs, section.schedule
    warmup = max(round(schedule.warmup_epochs * factor), min(schedule.warmup_epochs, 1))
    milestones = sorted({max(round(milestone * factor), 1) for milestone in schedule.milestones})
    stretched = schedule.model_copy(update={"warmup_epochs": warmup, "milestones": milestones})
    return section.model_copy(update={"epochs": epochs, "schedule": stretched})
