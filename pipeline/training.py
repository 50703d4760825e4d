"""The training engine: one loop that teacher and student share, from an objective to a trained network."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from models.cosine_classifier import ImageClassifier
from pipeline.augment import random_views
from pipeline.dataset import Images, normalise
from pipeline.errors import ParamsError, StageError
from pipeline.params import ImageParams, TrainingParams
from pipeline.schedule import learning_rate

EVALUATION_BATCH = 512
NOT_LOSSES = ("loss", "tau_g", "queries_without_keys")


class Objective(Protocol):
    """What the engine trains: a module of models.objectives."""

    views: int
    model: ImageClassifier

    def __call__(self, views: Tensor, target: Tensor, sample_ids: Tensor) -> dict[str, Tensor]: ...
    def undecayed(self) -> list[nn.Parameter]: ...
    def parameters(self) -> Any: ...
    def train(self, mode: bool = True) -> Any: ...
    def to(self, device: torch.device, *, memory_format: torch.memory_format) -> Any: ...


@dataclass
class Training:
    """One training run. `name` is the stage, which is also the params section that errors name."""

    name: str
    objective: Objective
    params: TrainingParams
    image: ImageParams
    seed: int
    device: torch.device

    def run(self, train: Images, validation: Images) -> list[dict[str, float]]:
        """Train for params.epochs; returns one record an epoch: loss parts, learning rate, validation accuracy, rate.

        Data order and augmentation come from one CPU generator, so a run depends on the seed and not on the device.
        Raises ParamsError when no batch can be filled, StageError at a loss that is not finite, naming its terms.
        """
        steps = len(train) // self.params.batch_size
        if steps == 0:
            raise ParamsError(
                f"{self.name}.batch_size is {self.params.batch_size}, above the {len(train)} training images; "
                f"lower it to at most {len(train)}"
            )
        # The layout that convolution kernels prefer, on CPU and GPU alike; the arithmetic is the same.
        self.objective.to(self.device, memory_format=torch.channels_last)
        images, labels = train.images.to(self.device), train.labels.to(self.device)
        optimizer = self._optimizer()
        generator = torch.Generator().manual_seed(self.seed)
        history: list[dict[str, float]] = []
        with progress_bar() as progress:
            bar = progress.add_task(self.name, total=steps * self.params.epochs)
            for epoch in range(self.params.epochs):
                rate = learning_rate(self.params.schedule, self.params.learning_rate, epoch, self.params.epochs)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                order = torch.randperm(len(train), generator=generator)[: steps * self.params.batch_size]
                started = time.perf_counter()
                sums: dict[str, Tensor] = {}
                for batch in order.split(self.params.batch_size):
                    chosen = batch.to(self.device)
                    for name, value in self._step(optimizer, images[chosen], labels[chosen], chosen, generator).items():
                        sums[name] = sums.get(name, 0) + value
                    progress.advance(bar)
                record = {"epoch": epoch + 1, **self._means(sums, steps, epoch), "learning_rate": rate}
                seconds = time.perf_counter() - started
                if len(validation):
                    record["validation_accuracy"] = accuracy(self.objective.model, validation, self.image, self.device)
                record["images_per_second"] = len(order) / seconds
                history.append(record)
                progress.console.print(self._line(record), highlight=False, soft_wrap=True)
        return history

    def _optimizer(self) -> torch.optim.Optimizer:
        undecayed = [parameter for parameter in self.objective.undecayed() if parameter.requires_grad]
        apart = {id(parameter) for parameter in undecayed}
        decayed = [p for p in self.objective.parameters() if p.requires_grad and id(p) not in apart]
        groups = [{"params": decayed, "weight_decay": self.params.weight_decay}]
        if undecayed:
            groups.append({"params": undecayed, "weight_decay": 0.0})
        return torch.optim.SGD(groups, lr=self.params.learning_rate, momentum=self.params.momentum)

    def _step(
        self, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, ids: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        self.objective.train()
        views = normalise(random_views(images, self.objective.views, self.params.augment, generator), self.image)
        parts = self.objective(views, labels, ids)
        optimizer.zero_grad(set_to_none=True)
        parts["loss"].backward()
        optimizer.step()
        return {name: value.detach() for name, value in parts.items()}

    def _means(self, sums: dict[str, Tensor], steps: int, epoch: int) -> dict[str, float]:
        means = {name: float(value) / steps for name, value in sums.items()}
        if not math.isfinite(means["loss"]):
            terms = [name for name in means if name not in NOT_LOSSES and not math.isfinite(means[name])]
            raise StageError(
                f"{self.name}: the loss is not finite in epoch {epoch + 1} (term {', '.join(terms) or 'loss'}); lower "
                f"{self.name}.learning_rate ({self.params.learning_rate:g}) or lengthen schedule.warmup_epochs"
            )
        return means

    def _line(self, record: dict[str, float]) -> str:
        parts = "  ".join(f"{name} {value:.4f}" for name, value in record.items() if name in ("loss", "tau_g"))
        score = f"  validation {record['validation_accuracy']:.1%}" if "validation_accuracy" in record else ""
        epoch = f"{self.name}  epoch {record['epoch']}/{self.params.epochs}"
        return f"{epoch}  {parts}{score}  lr {record['learning_rate']:.4f}  {record['images_per_second']:,.0f} images/s"


def progress_bar() -> Progress:
    """A bar with steps done and time left, on a terminal; nothing where the output is a file."""
    console = Console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@torch.inference_mode()
def outputs(model: ImageClassifier, data: Images, image: ImageParams, device: torch.device) -> tuple[Tensor, Tensor]:
    """Features [N,D] and logits [N,C] (cosine / tau_s, no prior) of a split, float32 on the CPU, model in eval mode."""
    was_training = model.training
    model.eval()
    features, logits = [], []
    for batch in data.images.split(EVALUATION_BATCH):
        feature, logit = model(normalise(batch.to(device), image))
        features.append(feature.float().cpu())
        logits.append(logit.float().cpu())
    model.train(was_training)
    return torch.cat(features), torch.cat(logits)


def accuracy(model: ImageClassifier, data: Images, image: ImageParams, device: torch.device) -> float:
    """Share of a split that the balanced answer (the unadjusted logits) gets right."""
    _, logits = outputs(model, data, image, device)
    return (logits.argmax(1) == data.labels).float().mean().item()


def choose_device(wanted: str) -> torch.device:
    """The device of params.device; `auto` is the first GPU or the CPU. Raises ParamsError when there is no such device."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ParamsError(
            f"device is {wanted!r}, but {torch.cuda.device_count()} GPUs are visible; expected auto or cpu"
        )
    return device


def as_jsonl(history: list[dict[str, float]]) -> str:
    """History as JSON lines, one record an epoch."""
    return "".join(json.dumps(record) + "\n" for record in history)


def as_csv(history: list[dict[str, float]]) -> str:
    """History as CSV, which DVC can plot."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(history[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return stream.getvalue()
