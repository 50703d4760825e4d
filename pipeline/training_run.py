"""What the two training stages share around the engine: checks before, state while, files after."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from models.backbones import UnknownBackboneError, check_backbone
from models.classification_objective import TeacherObjective
from models.queues import queue_lengths
from models.ranks import rank
from models.student_objective import StudentObjective
from pipeline.artifacts import (
    TENSORBOARD,
    as_csv,
    sha256_of_file,
    sha256_of_json,
    unfinished,
    whole_folder,
    write_file,
    write_json,
)
from pipeline.checkpoint import BEST, ModelConfig, save_model
from pipeline.errors import ParamsError
from pipeline.history import History, as_jsonl
from pipeline.params import Params, TrainingParams
from pipeline.prior import Prior
from pipeline.resume import RunFolder
from pipeline.tensorboard import write_scalars
from pipeline.training import Training
from serving.terminal import counted


@dataclass(frozen=True)
class Result:
    """The last epoch of a training stage."""

    last: dict[str, float]
    output: Path

    def __str__(self) -> str:
        score = f", validation {self.last['validation_accuracy']:.1%}" if "validation_accuracy" in self.last else ""
        return f"{counted(self.last['epoch'], 'epoch')}, loss {self.last['loss']:.4f}{score} → {self.output}"


def model_config(section: TrainingParams, params: Params, classes: int) -> ModelConfig:
    """The config of a network trained by a params section."""
    image = params.image
    return ModelConfig(section.backbone, classes, section.tau_s, image.size, image.mean, image.std, section.adjustment)


def stage_seed(seed: int, stage: str) -> int:
    """The seed of a training stage: `seed` itself for the teacher, one drawn from it for the student.

    With one for both, a student whose backbone is its teacher's starts with its teacher's initial weights and sees the
    images in the same order.
    """
    if stage == "teacher":
        return seed
    digest = hashlib.sha256(f"{stage} {seed}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def make_training(
    name: str,
    objective: TeacherObjective | StudentObjective,
    params: Params,
    prior: Prior,
    device: torch.device,
    folder: RunFolder,
) -> Training:
    """The run of stage `name`. While it runs, folder/metrics.jsonl holds its finished epochs, and the TensorBoard files too."""
    section: TrainingParams = getattr(params, name)

    def show(history: History) -> None:
        if rank() == 0:
            write_file(folder.folder / "metrics.jsonl", as_jsonl(history))
            if params.engine.tensorboard:
                write_scalars(TENSORBOARD / name, history)

    shift = prior.balanced_shift(section.adjustment)
    seed = stage_seed(params.seed, name)
    return Training(name, objective, section, params.image, seed, device, folder, params.engine, show, shift=shift)


def run_folder(section: TrainingParams, params: Params, output: Path, *inputs: Path) -> RunFolder:
    """Where an unfinished run of `output` keeps its state; another recipe, seed, library or input file starts anew."""
    depends = {
        "section": section.model_dump(mode="json"),
        "image": params.image.model_dump(mode="json"),
        "seed": params.seed,
        "precision": params.engine.precision,
        "stream": params.stream.model_dump(mode="json", include={"mode", "decode", "shuffle_mib"}),
        "torch": torch.__version__,
        "inputs": [sha256_of_file(path) for path in inputs],
    }
    return RunFolder(unfinished(output), sha256_of_json(depends))


def save_run(training: Training, config: ModelConfig, history: History, output: Path) -> Result:
    """Write network, config and history as one whole folder, by rank 0; what the run kept to go on is then dropped.

    The network is the last epoch's. That of the best epoch on validation lies in best/, with best.json, if there was a
    validation split: an extra, as whoever picks an epoch by a score must say so.
    """
    if rank() == 0:
        with whole_folder(output) as folder:
            save_model(training.model.state_dict(), config, folder)
            if training.best:
                save_model(training.best.weights, config, folder / BEST)
                best = {"epoch": training.best.epoch, "validation_accuracy": training.best.accuracy}
                write_json(folder / BEST / "best.json", best)
            write_file(folder / "metrics.jsonl", as_jsonl(history))
            write_file(folder / "history.csv", as_csv(history))
        if training.run_folder:
            training.run_folder.clear()
    return Result(history[-1], output)


def check_recipe(params: Params, prior: Prior) -> None:
    """Raise ParamsError for what would only fail after the teacher has been trained: a backbone's name, the queues' size."""
    for key, name in (("teacher.backbone", params.teacher.backbone), ("student.backbone", params.student.backbone)):
        try:
            check_backbone(name)
        except UnknownBackboneError as error:
            raise ParamsError(f"{key}: {error}") from None
    if not params.student.beta:
        return
    try:
        queue_lengths(prior.counts, params.student.queue_total, params.student.queue_minimum)
    except ValueError as error:
        raise ParamsError(f"student.queue_total, student.queue_minimum: {error}") from None


def check_backbones(params: Params) -> None:
    """Raise ParamsError when a network of torchvision or timm does not run at image.size, or the student does not export.

    Found on untrained networks, as a backbone that no export takes would else be known after hours. Once per run: by rank 0.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    size, opset = str(params.image.size), str(params.export.opset)
    wanted = {("teacher.backbone", params.teacher.backbone): [size]}
    wanted[("student.backbone", params.student.backbone)] = [size, opset]
    for (key, name), arguments in wanted.items():
        if "/" not in name:  # our own CIFAR ResNets take every size and are exported by the tests
            continue
        command = [sys.executable, "-P", "-m", "pipeline.backbone_check", name, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            reason = next((line for line in reversed(lines) if ": " in line), f"status {done.returncode}")
            raise ParamsError(
                f"{key} is {name!r}, which does not {'run or export' if len(arguments) > 1 else 'run'} at image.size = {size}: "
                f"{reason[:300]}; choose another backbone or size"
            )
