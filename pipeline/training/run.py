"""Common code of the training stages: checks before a run, checkpoints during it, output files after it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.contrast.queues import queue_lengths
from models.distributed import rank
from models.networks.backbones import UnknownBackboneError, build_backbone, check_backbone
from models.networks.cosine_classifier import HeadError
from models.networks.tuning import merged_state
from models.objectives.objective import Objective
from models.objectives.teacher import TeacherObjective
from pipeline.data.class_prior import Prior
from pipeline.features.stored import FeatureImages, training_inputs
from pipeline.model_io.checkpoint import BEST, ModelConfig, build_model, classifier_of, describe_memory, save_model
from pipeline.model_io.encoder import describe
from pipeline.model_io.pretrained import load_pretrained
from pipeline.params import (
    EncoderParams,
    EngineParams,
    ImageParams,
    Params,
    SegmentationParams,
    StreamParams,
    StudentParams,
    TrainingParams,
)
from pipeline.segmentation.dataset import LabelMapSplit
from pipeline.segmentation.inference import mean_iou, probe_finite
from pipeline.segmentation.stream import labelled_training_images
from pipeline.shared.artifacts import (
    TENSORBOARD,
    as_csv,
    sha256_of,
    sha256_of_json,
    unfinished,
    whole_folder,
    write_file,
    write_json,
)
from pipeline.shared.errors import ParamsError
from pipeline.training.engine import ACCURACY, Score, Training
from pipeline.training.history import METRICS, PRETRAINING, History, as_jsonl, validation_score, write_scalars
from pipeline.training.method_setup import check_experts, class_loss
from pipeline.training.resume import RunFolder
from pipeline.training.student_memory import StudentMemory
from pipeline.training.student_setup import zero_shot
from serving.shared.terminal import counted, print

MEAN_IOU = Score("validation_miou", mean_iou, probe_finite)
ENCODER = "encoder"  # the backbone that takes the stored features of section encoder


@dataclass(frozen=True)
class Result:
    """Result of a training stage: record of its last epoch, output folder, record of the student's memory."""

    last: dict[str, float]
    output: Path
    memory: dict[str, Any] | None = None

    def __str__(self) -> str:
        value = validation_score(self.last)
        score = "" if value is None else f", validation {value:.1%}"
        stored = describe_memory(self.memory) if self.memory else ""
        if "loss" not in self.last:
            return f"nothing trained, {stored}{score} → {self.output}"
        trained = f"{counted(self.last['epoch'], 'epoch')}, loss {self.last['loss']:.4f}{score}"
        return f"{trained}{f'; {stored}' if stored else ''} → {self.output}"


def model_config(
    section: TrainingParams,
    image: ImageParams,
    classes: int,
    encoder: dict[str, Any] | None = None,
    segmentation: SegmentationParams | None = None,
) -> ModelConfig:
    """Return the config of the network that a params section trains. encoder: record of the encoder of its features."""
    tune, tune_rank = (section.tune, section.tune_rank) if isinstance(section, StudentParams) else ("none", 0)
    experts = section.experts if isinstance(section, StudentParams) else None
    cosine = section.classifier.kind == "cosine"
    tau_s = section.tau_s if cosine else 1.0
    split = experts and {"experts": experts.count, "shared": experts.shared, "narrow": experts.narrow}
    if experts and experts.shared == "map":
        tau_s /= experts.count  # the logits of the branches are added, and their mean is what the network computes
    return ModelConfig(
        section.backbone, classes, tau_s, image.size, image.mean, image.std,
        section.assumed_adjustment, encoder, section.adapter, tune=tune, tune_rank=tune_rank,
        interpolation=image.interpolation, classifier=None if cosine else section.classifier.model_dump(), experts=split,
        segmentation=segmentation and segmentation.model_dump(include={"canvas", "classifier"}),
    )  # fmt: skip


def stage_seed(seed: int, stage: str) -> int:
    """Seed of a training stage: `seed` itself for the teacher, a seed derived from it for the student.

    With the same seed, a student with the teacher's backbone would start with the teacher's initial weights and get the
    images in the same order.
    """
    if stage == "teacher":
        return seed
    digest = hashlib.sha256(f"{stage} {seed}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def train_network(
    name: str,
    objective: Objective,
    config: ModelConfig,
    params: Params,
    prior: Prior,
    device: torch.device,
    output: Path,
    inputs: Sequence[Path],
    pretraining: History | None = None,
) -> Result:
    """Train the objective of stage `name` and write the network of the last epoch to `output`; resumes an interrupted run.

    inputs: files that the run depends on besides params. Finished epochs are written to metrics.jsonl of the run
    folder. pretraining: epochs of a training before this one, written beside those of the run.
    """
    section: TrainingParams = getattr(params, name)
    folder = run_folder(
        section, params.image, params.engine, params.stream, params.seed, output, inputs, params.segmentation
    )
    tensorboard = TENSORBOARD / name if params.engine.tensorboard else None

    def record(history: History) -> None:
        if rank() == 0:
            write_file(folder.folder / METRICS, as_jsonl(history))
            if tensorboard:
                write_scalars(tensorboard, history)

    shift, seed = prior.balanced_shift(section.assumed_adjustment), stage_seed(params.seed, name)
    training = Training(
        name, objective, section, params.image, seed, device, folder, params.engine, record, shift=shift,
        score=MEAN_IOU if params.segmentation else ACCURACY,
    )  # fmt: skip
    if params.segmentation:
        train, notice = labelled_training_images(params, device)
        validation = LabelMapSplit(params, "validation")
    else:
        train, validation, notice = training_inputs(
            params, name, device, augment=section.augment, views=objective.views
        )
    if notice and rank() == 0:
        print(f"{name}  {notice}", flush=True)
    if (
        name == "student"
        and (score := zero_shot(objective, validation, params.image, device)) is not None
        and rank() == 0
    ):
        print(
            f"student  zero-shot, without training: {score:.1%} of the validation images, by the mean text of each class"
        )
    memory = None
    if name == "student" and params.student.memory:
        assert isinstance(train, FeatureImages) and isinstance(validation, FeatureImages)  # params have an encoder
        memory = StudentMemory(params.student.memory, train, validation, prior, params.image)
    history = training.run(train, validation)
    return save_run(training, config, history, output, memory, pretraining)


def teacher_objective(section: TrainingParams, config: ModelConfig, prior: Prior, seed: int) -> TeacherObjective:
    """Teacher objective, L_cls (Eq. 6), of a network initialised from the stage's seed or from section.pretrained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(config, "teacher.backbone")
    load_pretrained(model.backbone, section.pretrained, "teacher.pretrained")
    loss = class_loss(section, prior)
    loss.start(model.classifier)
    return TeacherObjective(model, torch.tensor(prior.in_losses), section.adjustment, loss)


def run_folder(
    section: TrainingParams,
    image: ImageParams,
    engine: EngineParams,
    stream: StreamParams,
    seed: int,
    output: Path,
    inputs: Sequence[Path],
    segmentation: SegmentationParams | None = None,
) -> RunFolder:
    """Folder for the checkpoints of `output`; a change of recipe, seed, library or input file starts the run from scratch."""
    depends = {
        "section": section.model_dump(mode="json"),
        "image": image.model_dump(mode="json"),
        "seed": seed,
        "precision": engine.precision,
        "stream": stream.model_dump(mode="json", include={"mode", "decode", "shuffle_mib"}),
        "torch": torch.__version__,
        "inputs": [sha256_of(path) for path in inputs],
    }
    if segmentation:
        depends["segmentation"] = segmentation.model_dump(mode="json")
    return RunFolder(unfinished(output), sha256_of_json(depends))


def save_run(
    training: Training,
    config: ModelConfig,
    history: History,
    output: Path,
    memory: StudentMemory | None = None,
    pretraining: History | None = None,
) -> Result:
    """Write network, config and history as one complete folder, by rank 0, then remove the run's checkpoints.

    The network is that of the last epoch. With a validation split, the network of the best epoch is written to best/,
    with best.json. It is separate because a score of an epoch that was selected by its score must be labelled as such.
    memory: added to both networks. pretraining: as of `train_network`.
    """
    saved = config
    if rank() == 0:
        with whole_folder(output) as folder:
            weights: Mapping[str, Tensor] = merged_state(training.model)
            if memory:
                weights, saved = memory.add(weights, config)
            save_model(weights, saved, folder)
            if training.best:
                best_network = training.best.weights, config
                save_model(*(memory.add(*best_network) if memory else best_network), folder / BEST)
                best = {"epoch": training.best.epoch, training.score.name: training.best.accuracy}
                write_json(folder / BEST / "best.json", best)
            write_file(folder / METRICS, as_jsonl(history))
            if pretraining:
                write_file(folder / PRETRAINING, as_jsonl(pretraining))
            write_file(folder / "history.csv", as_csv(history))
        if training.run_folder:
            training.run_folder.clear()
    return Result(history[-1], output, saved.memory)


def check_recipe(teacher: TrainingParams, student: StudentParams, prior: Prior) -> None:
    """Raise ParamsError for errors that would appear only after the teacher's training.

    They are unknown backbones, heads that do not divide the feature, and too small queues.
    """
    for stage, section in (("teacher", teacher), ("student", student)):
        if section.backbone == ENCODER:
            continue
        try:
            check_backbone(section.backbone)
            if section.classifier.kind == "causal":
                width = build_backbone(section.backbone).feature_dim
                classifier_of(section.classifier.model_dump())(width, len(prior.classes))
        except UnknownBackboneError as error:
            raise ParamsError(f"{stage}.backbone: {error}") from None
        except HeadError as error:
            raise ParamsError(f"{stage}.classifier.{error}") from None
    check_experts(student, prior)
    queues = student.contrast.kind == "gml" and student.contrast_encoder != "text"
    if not student.beta or not queues or memory_alone(student):
        return
    try:
        queue_lengths(prior.counts, student.queue_total, student.queue_minimum)
    except ValueError as error:
        raise ParamsError(f"student.queue_total, student.queue_minimum: {error}") from None


def memory_alone(student: StudentParams) -> bool:
    """Whether the student is a memory without a trained network."""
    return student.memory is not None and student.memory.classifier == "memory"


def check_backbones(teacher: str, student: str, size: int, opset: int) -> None:
    """Raise ParamsError when a torchvision or timm network does not run at image.size, or the student's cannot be exported.

    Checked on untrained networks before training: otherwise a backbone that cannot be exported fails after hours. Only
    rank 0 runs the check.
    """
    if "/" in teacher:  # Tailor's CIFAR ResNets accept every size, and tests export them. `embed` has run the encoder.
        _check_network("teacher.backbone", teacher, size, teacher)
    if "/" in student:
        _check_network("student.backbone", student, size, student, str(opset))


def check_tuned_export(encoder: EncoderParams | None, student: StudentParams, size: int, opset: int) -> None:
    """Raise ParamsError when the encoder that the student tunes cannot be exported; as `check_backbones`."""
    if encoder and student.tune != "none":
        _check_network("encoder.name", encoder.name, size, f"timm/{describe(encoder).model}", str(opset), "encoder")


def _check_network(key: str, name: str, size: int, network: str, *options: str) -> None:
    """Run pipeline.preparation.backbone_check in a process. options: its arguments after the size; without any, no export."""
    if os.environ.get("RANK", "0") != "0":
        return
    command = [sys.executable, "-P", "-m", "pipeline.preparation.backbone_check", network, str(size), *options]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise ParamsError(
            f"{key} is {name!r}, which does not {'run or export' if options else 'run'} at image.size = {size}: "
            f"{reason[:300]}; choose another {'encoder' if key == 'encoder.name' else 'backbone'} or size"
        )
