"""The training engine: one loop that teacher and student share, from an objective to a trained network."""

from __future__ import annotations

import itertools
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from models.classification_objective import TeacherObjective
from models.cosine_classifier import ImageClassifier
from models.ranks import rank, rank_count, synchronise_batch_norm
from models.recomputation import NoBlocksError
from models.student_objective import StudentObjective
from pipeline.artifacts import FAILURES
from pipeline.capture import CapturedStep, CaptureError
from pipeline.dataset import AnyImages
from pipeline.errors import ParamsError, StageError
from pipeline.failure_dump import dump_failure
from pipeline.history import History, epoch_line, progress_bar
from pipeline.host_memory import keep_freed_memory
from pipeline.inference import NotFiniteError, accuracy, outputs
from pipeline.params import EngineParams, ImageParams, TrainingParams
from pipeline.resume import RunFolder, Snapshot
from pipeline.schedule import learning_rate
from pipeline.step import Step, StepInputs, own_places, own_rows
from pipeline.training_state import Best, Position, check_same_everywhere, snapshot_of, take_snapshot
from pipeline.watch import Failure, Watch
from serving.terminal import counted


@dataclass
class Training:
    """One training run. `name` is the stage, which is also the params section that errors name.

    With a run folder its state is kept there after every epoch, and every engine.checkpoint_seconds within one, and a
    run that finds such a state goes on from it, to the same bits on the CPU as if it had never stopped.
    shift: [C], what makes the network's logits answer for the balanced prior in validation; None: nothing.
    After `run`: `model` is the network of the last epoch (the average of weights where the recipe keeps one), `best` the
    one of the epoch with the best validation accuracy.
    """

    name: str
    objective: TeacherObjective | StudentObjective
    params: TrainingParams
    image: ImageParams
    seed: int
    device: torch.device
    run_folder: RunFolder | None = None
    engine: EngineParams = field(default_factory=EngineParams)
    on_epoch: Callable[[History], None] | None = None
    best: Best | None = None
    shift: np.ndarray | None = None

    @property
    def model(self) -> ImageClassifier:
        """The network that is evaluated and kept."""
        return self.objective.model if self._step.average is None else self._step.average.average

    def run(self, train: AnyImages, validation: AnyImages) -> History:
        """Train for params.epochs; returns one record an epoch: loss parts, learning rate, validation accuracy, rate.

        Data order and augmentation come from one CPU generator, so a run depends on the seed and not on the device nor
        on how many ranks share the batch. Raises ParamsError when no batch can be filled or shared out, StageError at a
        loss part that is not finite, naming step and terms; what was seen is then dumped to artifacts/failures/.
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
                bar = progress.add_task(self.name, total=total, completed=done, rate="")
                if done:
                    self._say(progress, f"resumes at step {done + 1} of {total}")
                self._take_step = self._captured(progress)
                try:
                    while self._at.epoch < self.params.epochs:
                        record = self._epoch(progress, bar, steps, validation)
                        progress.console.print(
                            epoch_line(self.name, record, self.params.epochs), highlight=False, soft_wrap=True
                        )
                except KeyboardInterrupt:
                    raise KeyboardInterrupt(self._how_to_resume(steps)) from None
        return self._at.history

    def _how_to_resume(self, steps: int) -> str:
        """What an interrupted run has kept, and how it is resumed, for the line that ends the stage."""
        if not self._kept or self.run_folder is None:
            return "no checkpoint is kept yet, so the same command starts from the first step"
        epoch, step = self._kept
        where = f"step {step:,} of {steps:,} in epoch {epoch + 1}" if step else f"epoch {epoch}"
        return f"the same command resumes after {where} of {self.params.epochs}, kept in {self.run_folder.folder}"

    def _check_batch(self, samples: int) -> None:
        batch, ranks = self.params.batch_size, rank_count()
        if batch > samples:
            raise ParamsError(
                f"{self.name}.batch_size is {batch}, above the {counted(samples, 'training image')}; lower it "
                f"to at most {samples}"
            )
        if batch % ranks:
            raise ParamsError(
                f"{self.name}.batch_size is {batch}, which {ranks} processes cannot share; expected a multiple"
            )
        parts, share = self.params.accumulate, batch // ranks
        # Batch norm has no variance of a single sample.
        if parts > 1 and (share % parts or share // parts < 2):
            raise ParamsError(
                f"{self.name}.accumulate is {parts}, into which a process's {share} images of a batch cannot be cut; "
                "expected a divisor that leaves at least 2 images a part"
            )

    def _prepare(self, train: AnyImages) -> None:
        if self.device.type == "cpu":
            keep_freed_memory()
        # The layout that convolution kernels prefer, on CPU and GPU alike; the arithmetic is the same.
        self.objective.to(self.device, memory_format=torch.channels_last)
        for module in self.objective.batch_modules():
            synchronise_batch_norm(module, self.device)
        precision = precision_of(self.engine, self.device)
        recompute = self.engine.checkpoint_activations
        try:
            self._step = Step(self.objective, self.params, self.image, train, self.device, precision, recompute)
        except NoBlocksError as error:
            raise ParamsError(f"engine.checkpoint_activations is true, but {self.name}.backbone: {error}") from None
        self._train = train
        self._watch = Watch(self.device)
        self._generator = torch.Generator().manual_seed(self.seed)
        self._at = Position()
        self._kept: tuple[int, int] | None = None  # finished epochs and steps of the newest checkpoint
        self._saved = time.monotonic()

    def _captured(self, progress: Progress) -> Callable[[StepInputs], dict[str, Tensor]]:
        """The step, as a CUDA graph where there is CUDA and one process, else (or when that fails) plain."""

        def plain(inputs: StepInputs) -> dict[str, Tensor]:
            return self._step(inputs.to(self.device))

        if self.device.type != "cuda" or not self.engine.capture or rank_count() > 1:
            return plain
        chosen = torch.arange(self.params.batch_size)
        example = self._step.draw(chosen, torch.Generator().manual_seed(self.seed))
        if self._train.images is None:
            example = replace(example, pixels=self._train.pixels(chosen, example.draws))
        try:
            return CapturedStep(self._step, example)
        except CaptureError as error:
            self._say(progress, f"trains without a captured step: {error}")
            return plain

    def _say(self, progress: Progress, text: str) -> None:
        progress.console.print(f"{self.name}  {text}", highlight=False, soft_wrap=True)

    def _epoch(self, progress: Progress, bar: Any, steps: int, validation: AnyImages) -> dict[str, float]:
        """The rest of the current epoch; its record."""
        at, batch = self._at, self.params.batch_size
        rate = learning_rate(self.params.schedule, self.params.learning_rate, at.epoch, self.params.epochs)
        self._step.optimiser.set_rate(rate)
        if at.order is None:
            at.order = self._train.order(self._generator)[: steps * batch]
        self._watch.begin(at.sums)
        started, first = time.perf_counter(), at.step
        batches = at.order.view(steps, batch)
        drawn, ahead = itertools.tee(self._drawn(batches[first:]))
        draws = (own_rows(inputs).draws for inputs, _ in ahead)
        with self._train.feed(own_places(batches[first:]), draws=draws) as feed:
            del ahead, draws  # a feed that does not draw ahead would have tee keep the draws of all steps
            for step, (inputs, state), pixels in zip(range(first, steps), drawn, feed, strict=False):
                self._generator.set_state(state)
                # The look-out remembers many steps; pixels are read again where one of them is wanted.
                failure = self._watch.add(step, inputs, self._take_step(replace(inputs, pixels=pixels)))
                if failure:
                    self._fail(failure, steps, rate)
                at.step = step + 1
                speed = (at.step - first) * batch / (time.perf_counter() - started)
                progress.update(bar, advance=1, rate=f"{speed:,.0f} images/s")
                if time.monotonic() - self._saved > self.engine.checkpoint_seconds:
                    self._save(steps, rate)
        means = self._watch.means(steps)
        if failure := self._watch.last_failure():
            self._fail(failure, steps, rate)
        self._check_network()
        seconds = time.perf_counter() - started
        data = self._train.epoch_record(seconds)
        if told := self._train.replaced() or replaced_elsewhere(data):
            self._say(progress, told)
        record = {"epoch": at.epoch + 1, **means, "learning_rate": rate, **self.objective.observations()}
        try:
            if len(validation):
                record["validation_accuracy"] = accuracy(self.model, validation, self.image, self.device, self.shift)
            elif at.epoch + 1 == self.params.epochs:
                some = torch.arange(min(batch, len(self._train)))
                outputs(self.model, self._train.pixels(some), self.image, self.device)
        except NotFiniteError as error:
            raise self._diverged(str(error)) from None
        if len(validation):
            self._keep_best(record)
        record["images_per_second"] = (steps - first) * batch / seconds
        record["memory_mib"] = peak_memory_mib(self.device)
        record.update(data)
        self._at = Position(epoch=at.epoch + 1, history=[*at.history, record])
        self._save(steps, rate)
        if self.on_epoch:
            self.on_epoch(self._at.history)
        return record

    def _drawn(self, batches: Tensor) -> Iterator[tuple[StepInputs, Tensor]]:
        """The inputs of each batch and the generator's state after it: a stream draws ahead of the steps, and the run's own
        generator must not, as a checkpoint keeps it."""
        ahead = torch.Generator()
        ahead.set_state(self._generator.get_state())
        for chosen in batches:
            yield self._step.draw(chosen, ahead), ahead.get_state()

    def _check_network(self) -> None:
        """Raise StageError when the last step has left a weight or a statistic that is not finite: no later loss shows it."""
        state = {name: tensor for name, tensor in self.model.state_dict().items() if tensor.is_floating_point()}
        finite = torch.stack([tensor.isfinite().all() for tensor in state.values()]).tolist()
        if bad := [name for name, good in zip(state, finite, strict=True) if not good]:
            raise self._diverged(f"{len(bad)} of {len(state)} tensors are not finite, {bad[0]} the first")

    def _diverged(self, what: str) -> StageError:
        return StageError(
            f"{self.name}: the network has diverged by the end of epoch {self._at.epoch + 1}: {what}; lower "
            f"{self.name}.learning_rate ({self.params.learning_rate:g}) or lengthen schedule.warmup_epochs"
        )

    def _keep_best(self, record: dict[str, float]) -> None:
        if self.best is None or record["validation_accuracy"] > self.best.accuracy:
            weights = {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}
            self.best = Best(int(record["epoch"]), record["validation_accuracy"], weights)

    def _fail(self, failure: Failure, steps: int, rate: float) -> None:
        """Dump what is known and raise StageError."""
        epoch, folder = self._at.epoch + 1, FAILURES / self.name
        if rank() == 0:
            facts = {"stage": self.name, "epoch": epoch, "steps": steps, "learning_rate": rate, "seed": self.seed}
            dump_failure(folder, failure, self._watch, self._step, self._train, facts)
        raise StageError(
            f"{self.name}: not finite in epoch {epoch}, step {failure.step + 1} of {steps}: {', '.join(failure.terms)}; "
            f"lower {self.name}.learning_rate ({self.params.learning_rate:g}) or lengthen schedule.warmup_epochs; "
            f"the batch and the steps before it are in {folder}"
        )

    def _save(self, steps: int, rate: float) -> None:
        """Keep a checkpoint, unless the run has failed already."""
        self._saved = time.monotonic()
        if self.run_folder is None:
            return
        if failure := self._watch.last_failure():
            self._fail(failure, steps, rate)
        at = self._at
        if at.step:
            at.sums = self._watch.kept_sums()
        if rank() == 0:
            kept = snapshot_of(at, self._step, self._generator, self.best)
            self.run_folder.save(at.epoch * 1_000_000 + at.step, kept)
        self._kept = at.epoch, at.step

    def _restore(self) -> None:
        snapshot: Snapshot | None = self.run_folder.load() if self.run_folder else None
        check_same_everywhere(snapshot, self.device, self.run_folder.folder if self.run_folder else None)
        if snapshot is not None:
            self._at, self.best = take_snapshot(snapshot, self._step, self._generator)
            self._kept = self._at.epoch, self._at.step


def replaced_elsewhere(data: dict[str, float]) -> str | None:
    """What other processes alone have replaced in an epoch, in a line, as only one speaks; None where nothing was."""
    count = data.get("images_replaced", 0)
    if not count:
        return None
    return (
        f"{counted(count, 'image')} could not be read by other processes; replaced by others of their class; "
        "run `dvc repro -f split` to leave them out"
    )


def precision_of(engine: EngineParams, device: torch.device) -> torch.dtype:
    """engine.precision as a dtype: `auto` is bfloat16 on CUDA, where it is fast, and float32 elsewhere."""
    half = engine.precision == "bfloat16" or (engine.precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if half else torch.float32


def peak_memory_mib(device: torch.device) -> float:
    """The most memory that the run has held: of the device's allocator on CUDA, else of the process. MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
