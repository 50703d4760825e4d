"""The training engine: one loop that teacher and student share, from an objective to a trained network."""

from __future__ import annotations

import inspect
import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.objectives import StudentObjective, TeacherObjective
from models.ranks import mean_over_ranks, rank, rank_count, synchronise_batch_norm
from pipeline.augment import random_views
from pipeline.dataset import Images, normalise
from pipeline.errors import ParamsError, StageError
from pipeline.history import History, epoch_line, progress_bar
from pipeline.inference import accuracy
from pipeline.params import ImageParams, TrainingParams
from pipeline.resume import RunFolder, Snapshot
from pipeline.schedule import learning_rate

NOT_LOSSES = ("loss", "tau_g", "queries_without_keys", "gradient_norm")
CHECKPOINT_SECONDS = 60.0


@dataclass
class Position:
    """How far a run is: epoch and step (0-based, the next to do), the epoch's order, its sums so far, finished epochs."""

    epoch: int = 0
    step: int = 0
    order: Tensor | None = None
    sums: dict[str, Tensor] = field(default_factory=dict)
    history: History = field(default_factory=list)


@dataclass
class Training:
    """One training run. `name` is the stage, which is also the params section that errors name.

    With a run folder its state is kept there after every epoch, and every `checkpoint_seconds` within one, and a run
    that finds such a state goes on from it, to the same bits on the CPU as if it had never stopped.
    """

    name: str
    objective: TeacherObjective | StudentObjective
    params: TrainingParams
    image: ImageParams
    seed: int
    device: torch.device
    run_folder: RunFolder | None = None
    checkpoint_seconds: float = CHECKPOINT_SECONDS

    def run(self, train: Images, validation: Images) -> History:
        """Train for params.epochs; returns one record an epoch: loss parts, learning rate, validation accuracy, rate.

        Data order and augmentation come from one CPU generator, so a run depends on the seed and not on the device nor
        on how many ranks share the batch. Raises ParamsError when no batch can be filled or shared out, StageError at a
        loss that is not finite, naming its terms.
        """
        self._check_batch(len(train))
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            self._prepare(train)
            self._restore()
            steps = len(train) // self.params.batch_size
            with progress_bar(quiet=rank() > 0) as progress:
                total = steps * self.params.epochs
                done = self._at.epoch * steps + self._at.step
                bar = progress.add_task(self.name, total=total, completed=done)
                if done:
                    progress.console.print(f"{self.name}  goes on at step {done + 1} of {total}", highlight=False)
                while self._at.epoch < self.params.epochs:
                    record = self._epoch(progress, bar, steps, validation)
                    progress.console.print(
                        epoch_line(self.name, record, self.params.epochs), highlight=False, soft_wrap=True
                    )
        return self._at.history

    def _check_batch(self, samples: int) -> None:
        batch, ranks = self.params.batch_size, rank_count()
        if batch > samples:
            raise ParamsError(
                f"{self.name}.batch_size is {batch}, above the {samples} training images; lower it to at most {samples}"
            )
        if batch % ranks:
            raise ParamsError(
                f"{self.name}.batch_size is {batch}, which {ranks} processes cannot share; expected a multiple"
            )

    def _prepare(self, train: Images) -> None:
        # The layout that convolution kernels prefer, on CPU and GPU alike; the arithmetic is the same.
        self.objective.to(self.device, memory_format=torch.channels_last)
        for module in self.objective.batch_modules():
            synchronise_batch_norm(module, self.device)
        if rank_count() > 1:
            self._step_module: nn.Module = shared_gradients(self.objective)
        else:
            self._step_module = self.objective
        self._images, self._labels = train.images.to(self.device), train.labels.to(self.device)
        self._optimizer = self._make_optimizer()
        self._generator = torch.Generator().manual_seed(self.seed)
        self._at = Position()
        self._saved = time.monotonic()

    def _make_optimizer(self) -> torch.optim.Optimizer:
        undecayed = [parameter for parameter in self.objective.undecayed() if parameter.requires_grad]
        apart = {id(parameter) for parameter in undecayed}
        decayed = [p for p in self.objective.parameters() if p.requires_grad and id(p) not in apart]
        groups = [{"params": decayed, "weight_decay": self.params.weight_decay}]
        if undecayed:
            groups.append({"params": undecayed, "weight_decay": 0.0})
        fused = self.device.type == "cuda"
        return torch.optim.SGD(groups, lr=self.params.learning_rate, momentum=self.params.momentum, fused=fused)

    def _epoch(self, progress: Progress, bar: Any, steps: int, validation: Images) -> dict[str, float]:
        """The rest of the current epoch; its record."""
        at, batch = self._at, self.params.batch_size
        rate = learning_rate(self.params.schedule, self.params.learning_rate, at.epoch, self.params.epochs)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        if at.order is None:
            at.order = torch.randperm(len(self._labels), generator=self._generator)[: steps * batch]
        started, first = time.perf_counter(), at.step
        for step in range(first, steps):
            for name, value in self._step(at.order[step * batch : (step + 1) * batch].to(self.device)).items():
                at.sums[name] = at.sums.get(name, 0) + value
            at.step = step + 1
            progress.advance(bar)
            if time.monotonic() - self._saved > self.checkpoint_seconds:
                self._means(steps)  # a loss that is not finite stops here, not at the epoch's end
                self._save()
        record = {"epoch": at.epoch + 1, **self._means(steps), "learning_rate": rate}
        seconds = time.perf_counter() - started
        if len(validation):
            record["validation_accuracy"] = accuracy(self.objective.model, validation, self.image, self.device)
        record["images_per_second"] = (steps - first) * batch / seconds
        self._at = Position(epoch=at.epoch + 1, history=[*at.history, record])
        self._save()
        return record

    def _step(self, chosen: Tensor) -> dict[str, Tensor]:
        """One optimiser step on the images of `chosen` [B]; its loss parts. Nothing is read back from the device."""
        self.objective.train()
        share = len(chosen) // rank_count()
        mine = slice(rank() * share, (rank() + 1) * share)
        views = random_views(self._images[chosen], self.objective.views, self.params.augment, self._generator)[:, mine]
        parts = self._step_module(normalise(views, self.image), self._labels[chosen[mine]], chosen[mine])
        self._optimizer.zero_grad(set_to_none=True)
        parts["loss"].backward()
        gradients = [p.grad for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]
        parts["gradient_norm"] = nn.utils.get_total_norm(gradients)
        self._optimizer.step()
        self.objective.after_step()
        return {name: value.detach() for name, value in parts.items()}

    def _means(self, steps: int) -> dict[str, float]:
        """Means over the steps done of this epoch. Raises StageError when a loss is not finite, naming its terms."""
        done = self._at.step
        means = {name: mean_over_ranks(value).item() / done for name, value in self._at.sums.items()}
        if not math.isfinite(means["loss"]):
            terms = [name for name in means if name not in NOT_LOSSES and not math.isfinite(means[name])]
            raise StageError(
                f"{self.name}: the loss is not finite in epoch {self._at.epoch + 1}, by step {done} of {steps} "
                f"(term {', '.join(terms) or 'loss'}); lower {self.name}.learning_rate ({self.params.learning_rate:g}) "
                "or lengthen schedule.warmup_epochs"
            )
        return means

    def _save(self) -> None:
        self._saved = time.monotonic()
        if self.run_folder is None:
            return
        at = self._at
        sums = {f"sums.{name}": mean_over_ranks(value) for name, value in at.sums.items()}
        if rank() > 0:
            return
        tensors = {
            **{f"objective.{name}": value for name, value in trained_state(self.objective).items()},
            **{f"momentum.{i}": value for i, value in enumerate(self._momentum())},
            **sums,
            "generator": self._generator.get_state(),
            "torch_generator": torch.get_rng_state(),
            "order": at.order if at.order is not None else torch.empty(0, dtype=torch.int64),
        }
        if self.device.type == "cuda":
            tensors["cuda_generator"] = torch.cuda.get_rng_state(self.device)
        state = {"epoch": at.epoch, "step": at.step, "history": at.history}
        self.run_folder.save(at.epoch * 1_000_000 + at.step, Snapshot(tensors, state))

    def _momentum(self) -> list[Tensor]:
        states = self._optimizer.state
        return [
            states[p]["momentum_buffer"]
            for group in self._optimizer.param_groups
            for p in group["params"]
            if p in states
        ]

    def _restore(self) -> None:
        snapshot = self.run_folder.load() if self.run_folder else None
        self._check_same_everywhere(snapshot)
        if snapshot is None:
            return
        tensors, state = snapshot.tensors, snapshot.state
        load_trained_state(
            self.objective, {k.removeprefix("objective."): v for k, v in tensors.items() if k[:10] == "objective."}
        )
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        for i, parameter in enumerate(parameters):
            if f"momentum.{i}" in tensors:
                buffer = torch.empty_like(parameter).copy_(tensors[f"momentum.{i}"])
                self._optimizer.state[parameter]["momentum_buffer"] = buffer
        self._generator.set_state(tensors["generator"])
        torch.set_rng_state(tensors["torch_generator"])
        if self.device.type == "cuda" and "cuda_generator" in tensors:
            torch.cuda.set_rng_state(tensors["cuda_generator"], self.device)
        order = tensors["order"] if len(tensors["order"]) else None
        sums = {
            name.removeprefix("sums."): value.to(self.device) for name, value in tensors.items() if name[:5] == "sums."
        }
        self._at = Position(state["epoch"], state["step"], order, sums, state["history"])

    def _check_same_everywhere(self, snapshot: Snapshot | None) -> None:
        """Every rank must go on from the same step; hosts that do not share the run folder would not."""
        found = -1.0 if snapshot is None else snapshot.state["epoch"] * 1e6 + snapshot.state["step"]
        place = torch.tensor(found, dtype=torch.float64)
        if mean_over_ranks(place.to(self.device)).item() != place.item():
            folder = self.run_folder.folder if self.run_folder else None
            raise StageError(
                f"{folder}: processes find different checkpoints in it; put artifacts/ on a disk that all share"
            )


def shared_gradients(objective: nn.Module) -> DistributedDataParallel:
    """The objective with gradients averaged over the ranks. Buffers are not sent: every rank enqueues the gathered batch."""
    # Newer releases renamed the switch, and warn of the old name.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    switch = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return DistributedDataParallel(objective, **switch)


def trained_state(objective: nn.Module) -> dict[str, Tensor]:
    """Everything of an objective that training changes: its state without the frozen teacher's."""
    return {name: value for name, value in objective.state_dict().items() if not name.startswith("teacher.")}


def load_trained_state(objective: nn.Module, state: dict[str, Tensor]) -> None:
    """Put a `trained_state` back. Raises StageError when it is of another network."""
    missing, unexpected = objective.load_state_dict(state, strict=False)
    lost = [name for name in missing if not name.startswith("teacher.")]
    if lost or unexpected:
        raise StageError(
            f"the checkpoint does not fit the network ({(lost + unexpected)[0]}); remove it and start again"
        )
