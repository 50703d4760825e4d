"""Training engine: the training loop of teacher and student, from an objective to a trained network."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from models.class_sampler import ClassSampler
from models.distributed import rank, rank_count, sum_over_ranks, synchronise_batch_norm
from models.networks.activation_checkpointing import NoBlocksError
from models.networks.cosine_classifier import ImageClassifier
from models.networks.tuning import merged_state
from models.objectives.objective import Objective
from pipeline.data.dataset import AnyImages
from pipeline.model_io.inference import NotFiniteError, accuracy, outputs
from pipeline.params import EngineParams, ImageParams, StudentParams, TrainingParams
from pipeline.shared.artifacts import FAILURES
from pipeline.shared.errors import ParamsError, StageError
from pipeline.shared.host_memory import keep_freed_memory, peak_memory_mib
from pipeline.shared.progress import progress_bar
from pipeline.training.cuda_graph import CapturedStep, CaptureError
from pipeline.training.history import History, epoch_line
from pipeline.training.non_finite import Failure, NonFiniteMonitor, dump_failure
from pipeline.training.optimiser import ADAM_CAPTURE_RATE, step_rate
from pipeline.training.resume import RunFolder, Snapshot
from pipeline.training.state import (
    Best,
    Position,
    check_batch,
    check_same_everywhere,
    create_snapshot,
    non_finite_tensors,
    replaced_elsewhere,
    restore_snapshot,
)
from pipeline.training.step import Step, StepInputs, draw_ahead, own_indices, own_rows, precision_of

DECIDE_EVERY = 16  # steps between two decisions of several ranks about a checkpoint


@dataclass(frozen=True)
class Score:
    """How a network is evaluated on the validation split after each epoch; a larger value is better.

    name: key of the value in the record. measure(model, validation, image, device, shift): the value. probe(model,
    pixels, image, device): one batch of training images, if there is no validation. Both raise NotFiniteError.
    """

    name: str
    measure: Callable[..., float]
    probe: Callable[..., Any]


ACCURACY = Score("validation_accuracy", accuracy, outputs)


@dataclass
class Training:
    """One training run. `name` is the stage, which is also the params section that error messages name.

    With a run folder, a checkpoint is written there after every epoch and every engine.checkpoint_seconds within an
    epoch. A run that finds a checkpoint resumes from it; on the CPU the result is bit-identical to a run without
    interruption. shift: [C], added to the logits in validation to get logits for the balanced prior; None: no shift.
    After `run`, `model` is the network of the last epoch (the EMA of weights if the recipe has one) and `best` the
    network of the epoch with the best validation score.
    """

    name: str
    objective: Objective
    params: TrainingParams
    image: ImageParams
    seed: int
    device: torch.device
    run_folder: RunFolder | None = None
    engine: EngineParams = field(default_factory=EngineParams)
    on_epoch: Callable[[History], None] | None = None
    best: Best | None = None
    shift: np.ndarray | None = None
    score: Score = ACCURACY

    @property
    def model(self) -> ImageClassifier:
        """The network that is evaluated and saved."""
        return self.objective.model if self.step.average is None else self.step.average.average

    @property
    def _sampling(self) -> float:
        return self.params.sampling if isinstance(self.params, StudentParams) else 1.0

    def run(self, train: AnyImages, validation: AnyImages) -> History:
        """Train for params.epochs; returns one record per epoch: losses, learning rate, validation score, speed.

        Data order and augmentation use one CPU generator, so a run depends on the seed but not on the device or the
        number of ranks. Raises ParamsError when a batch cannot be filled or divided among the ranks, StageError when a
        loss is not finite, naming step and terms; the batch and the state are then dumped to artifacts/failures/.
        """
        check_batch(self.name, self.params, len(train))
        if self.objective.companion is not None and train.images is None:
            raise ParamsError(
                f"stream.mode: the images are streamed in a fixed order, but {self.name} draws a second batch in each step; "
                "set stream.mode: off"
            )
        if self._sampling != 1 and getattr(train, "groups", None) is not None:
            raise ParamsError(
                f"{self.name}.sampling is {self._sampling:g}, but the table is streamed in its own order; set "
                f"stream.mode: off, or {self.name}.sampling: 1.0"
            )
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            self._prepare(train)
            self._restore()
            steps = len(train) // self.params.batch_size
            with progress_bar(quiet=rank() > 0) as progress:
                total = steps * self.params.epochs
                done = self._at.epoch * steps + self._at.step
                bar = progress.add_task(self.name, total=total, completed=done, rate="")
                if done:
                    self._print(progress, f"resumes at step {done + 1} of {total}")
                self._take_step = self._captured(progress)
                try:
                    while self._at.epoch < self.params.epochs:
                        record = self._epoch(progress, bar, steps, validation)
                        self._print(progress, epoch_line(record, self.params.epochs))
                except KeyboardInterrupt:
                    raise KeyboardInterrupt(self._how_to_resume(steps)) from None
        return self._at.history

    def _how_to_resume(self, steps: int) -> str:
        """Text for the last line of an interrupted stage: the newest checkpoint and how to resume from it."""
        if not self._checkpoint or self.run_folder is None:
            return "no checkpoint is kept yet, so the same command starts from the first step"
        epoch, step = self._checkpoint
        point = f"step {step:,} of {steps:,} in epoch {epoch + 1}" if step else f"epoch {epoch}"
        return f"the same command resumes after {point} of {self.params.epochs}, kept in {self.run_folder.folder}"

    def _prepare(self, train: AnyImages) -> None:
        if self.device.type == "cpu":
            keep_freed_memory()
        else:
            torch.cuda.reset_peak_memory_stats(self.device)
        # Convolution kernels are fastest in this memory layout on CPU and GPU; the arithmetic is the same.
        self.objective.to(self.device, memory_format=torch.channels_last)
        for module in self.objective.batch_modules():
            synchronise_batch_norm(module, self.device)
        precision = precision_of(self.engine, self.device)
        recompute = self.engine.checkpoint_activations
        try:
            self.step = Step(self.objective, self.params, self.image, train, self.device, precision, recompute)
        except NoBlocksError as error:
            raise ParamsError(f"engine.checkpoint_activations is true, but {self.name}.backbone: {error}") from None
        self._train = train
        self._monitor = NonFiniteMonitor(self.device)
        self._generator = torch.Generator().manual_seed(self.seed)
        self._at = Position()
        self._checkpoint: tuple[int, int] | None = None  # the newest: finished epochs, and steps of the next
        self._saved = time.monotonic()

    def _captured(self, progress: Progress) -> Callable[[StepInputs], dict[str, Tensor]]:
        """The training step as a CUDA graph for one process on CUDA; otherwise, or if the capture fails, the plain step."""

        step, device = self.step, self.device  # not self: a cycle would keep the run on the device after its end

        def plain(inputs: StepInputs) -> dict[str, Tensor]:
            return step(inputs.to(device))

        if self.device.type != "cuda" or not self.engine.capture or rank_count() > 1:
            return plain
        chosen = torch.arange(self.params.batch_size)
        example = self.step.draw(chosen, torch.Generator().manual_seed(self.seed))
        if self._train.images is None:
            example = replace(example, pixels=self._train.pixels(chosen, example.draws))
        if self.params.optimizer == "adamw":
            self.step.optimiser.set_rate(ADAM_CAPTURE_RATE)
        try:
            return CapturedStep(self.step, example)
        except CaptureError as error:
            self._print(progress, f"trains without a captured step: {error}")
            return plain

    def _print(self, progress: Progress, text: str) -> None:
        progress.console.print(f"{self.name}  {text}", highlight=False, soft_wrap=True)

    def _epoch(self, progress: Progress, bar: Any, steps: int, validation: AnyImages) -> dict[str, float]:
        """Run the remaining steps of the current epoch; returns its record."""
        at, batch = self._at, self.params.batch_size
        rate = self._set_rate(at.step, steps)
        self.objective.begin_epoch(at.epoch, self.params.epochs)
        if at.order is None:
            at.order = self._order(steps * batch)
        self._monitor.begin(at.sums)
        started, first = time.perf_counter(), at.step
        batches = at.order.view(steps, batch)
        drawn, ahead = itertools.tee(draw_ahead(self.step, batches[first:], self._generator))
        draws = (own_rows(inputs).draws for inputs, _ in ahead)
        with self._train.feed(own_indices(batches[first:]), draws=draws) as feed:
            del ahead, draws  # otherwise tee would buffer the draws of all steps if the feed does not read them
            for step, (inputs, state), pixels in zip(range(first, steps), drawn, feed, strict=False):
                self._generator.set_state(state)
                if self.params.schedule.kind == "poly":
                    rate = self._set_rate(step, steps)
                # The monitor stores the inputs of many steps without pixels; a dump reads the pixels again.
                if failure := self._monitor.add(step, inputs, self._take_step(replace(inputs, pixels=pixels))):
                    self._fail(failure, steps, rate)
                at.step = step + 1
                speed = (at.step - first) * batch / (time.perf_counter() - started)
                progress.update(bar, advance=1, rate=f"{speed:,.0f} images/s")
                if self._checkpoint_due(step):
                    self._save(steps, rate)
        means = self._monitor.means(steps)
        if failure := self._monitor.last_failure():
            self._fail(failure, steps, rate)
        # The last step can leave a non-finite weight or statistic that no loss of the epoch shows.
        if fault := non_finite_tensors(self.model):
            raise self._diverged(fault)
        seconds = time.perf_counter() - started
        data = self._train.epoch_record(seconds)
        if notice := self._train.replaced() or replaced_elsewhere(data):
            self._print(progress, notice)
        record = {"epoch": at.epoch + 1, **means, "learning_rate": rate, **self.objective.observations()}
        try:
            if len(validation):
                record[self.score.name] = self.score.measure(
                    self.model, validation, self.image, self.device, self.shift
                )
                self._update_best(record)
            elif at.epoch + 1 == self.params.epochs:
                indices = torch.arange(min(batch, len(self._train)))
                self.score.probe(self.model, self._train.pixels(indices), self.image, self.device)
        except NotFiniteError as error:
            raise self._diverged(str(error)) from None
        record["images_per_second"] = (steps - first) * batch / seconds
        record["memory_mib"] = peak_memory_mib(self.device)
        record.update(data)
        self._at = Position(epoch=at.epoch + 1, history=[*at.history, record])
        self._save(steps, rate)
        if self.on_epoch:
            self.on_epoch(self._at.history)
        return record

    def _order(self, images: int) -> Tensor:
        """Indices of the images of an epoch, int64 [images]."""
        if self._sampling == 1:
            return self._train.order(self._generator)[:images]
        return ClassSampler(self._train.labels, self.objective.model.classes, self._sampling).draw(
            images, self._generator
        )

    def _set_rate(self, step: int, steps: int) -> float:
        """Set the learning rate of a step of the current epoch, and return it."""
        at, of = (self._at.epoch, step), (self.params.epochs, steps)
        rate = step_rate(self.params.schedule, self.params.learning_rate, at, of)
        self.step.optimiser.set_rate(rate)
        return rate

    def _diverged(self, what: str) -> StageError:
        return StageError(
            f"{self.name}: the network has diverged by the end of epoch {self._at.epoch + 1}: {what}; lower "
            f"{self.name}.learning_rate ({self.params.learning_rate:g}) or lengthen schedule.warmup_epochs"
        )

    def _update_best(self, record: dict[str, float]) -> None:
        value = record[self.score.name]
        if self.best is None or value > self.best.accuracy:
            weights = {name: tensor.detach().cpu().clone() for name, tensor in merged_state(self.model).items()}
            self.best = Best(int(record["epoch"]), value, weights)

    def _fail(self, failure: Failure, steps: int, rate: float) -> None:
        """Dump the failure and raise StageError."""
        parent = self.run_folder.folder.parent / FAILURES.name if self.run_folder else FAILURES
        epoch, folder = self._at.epoch + 1, parent / self.name
        if rank() == 0:
            facts = {"stage": self.name, "epoch": epoch, "steps": steps, "learning_rate": rate, "seed": self.seed}
            dump_failure(folder, failure, self._monitor, self.step, self._train, facts)
        raise StageError(
            f"{self.name}: not finite in epoch {epoch}, step {failure.step + 1} of {steps}: {', '.join(failure.terms)}; "
            f"lower {self.name}.learning_rate ({self.params.learning_rate:g}) or lengthen schedule.warmup_epochs; "
            f"the batch and the steps before it are in {folder}"
        )

    def _checkpoint_due(self, step: int) -> bool:
        """Whether to write a checkpoint after a step. Ranks, whose clocks differ, decide together: it sums over them."""
        due = time.monotonic() - self._saved > self.engine.checkpoint_seconds
        if rank_count() == 1:
            return due
        # Only now and then, because the host waits for the device.
        return step % DECIDE_EVERY == 0 and bool(sum_over_ranks(torch.tensor(float(due), device=self.device)))

    def _save(self, steps: int, rate: float) -> None:
        """Write a checkpoint, unless the run has already failed."""
        self._saved = time.monotonic()
        if self.run_folder is None:
            return
        if failure := self._monitor.last_failure():
            self._fail(failure, steps, rate)
        at = self._at
        if at.step:
            at.sums = self._monitor.checkpoint_sums()
        if rank() == 0:
            snapshot = create_snapshot(at, self.step, self._generator, self.best)
            self.run_folder.save(at.epoch * 1_000_000 + at.step, snapshot)
        self._checkpoint = at.epoch, at.step

    def _restore(self) -> None:
        snapshot: Snapshot | None = self.run_folder.load() if self.run_folder else None
        check_same_everywhere(snapshot, self.device, self.run_folder.folder if self.run_folder else None)
        if snapshot is not None:
            self._at, self.best = restore_snapshot(snapshot, self.step, self._generator)
            self._checkpoint = self._at.epoch, self._at.step
