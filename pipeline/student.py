"""Stage `student`: train the student against class-wise queues of the frozen teacher's features; writes artifacts/student/."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from models.distributed import rank
from models.objectives.rotation import ANGLES, RotationObjective
from pipeline.command_line import stage_main
from pipeline.data.class_prior import Prior, load_prior
from pipeline.data.dataset import Images
from pipeline.features.stored import stored_encoder, training_inputs
from pipeline.model_io.checkpoint import WEIGHTS, ModelConfig, build_model
from pipeline.model_io.devices import joined_ranks
from pipeline.params import Params
from pipeline.segmentation import objectives
from pipeline.shared.artifacts import EMBEDDINGS_INDEX, PRIOR, SPLIT, STUDENT, TEACHER, TEXT
from pipeline.text.stored import FEATURES_FILE
from pipeline.training.engine import Training
from pipeline.training.history import History
from pipeline.training.resume import RunFolder
from pipeline.training.run import (
    Result,
    check_backbones,
    check_recipe,
    check_tuned_export,
    memory_alone,
    model_config,
    run_folder,
    stage_seed,
    train_network,
)
from pipeline.training.student_memory import write_memory
from pipeline.training.student_setup import build_objective
from serving.shared.terminal import print


def run(params: Params, output: Path = STUDENT, teacher: Path = TEACHER) -> Result:
    """Train the student on three views with gamma·L_cls + beta·(L_GML + L_tau) + alpha·L_KD; saves the last epoch.

    Resumes an interrupted run. A teacher that no loss term needs is not loaded (with alpha 0 and contrast_encoder
    momentum or text). With student.memory.classifier `memory` nothing is trained: the memory is the student.
    Raises ParamsError when the queues cannot hold queue_minimum rows of every class.
    """
    prior, section, image = load_prior(), params.student, params.image
    if params.segmentation:
        return _train_segmentation(params, prior, output, teacher)
    check_recipe(params.teacher, section, prior)
    check_backbones(params.teacher.backbone, section.backbone, image.size, params.export.opset)
    check_tuned_export(params.encoder, section, image.size, params.export.opset)
    config = model_config(section, image, len(prior.classes), stored_encoder(params))
    with joined_ranks(params.device) as device:
        if section.memory and memory_alone(section):
            return Result(*write_memory(section.memory, config, params, prior, output))
        seed, start, rotation, earlier = stage_seed(params.seed, "student"), None, None, None
        if section.pretraining == "rotation":
            rotation, start, earlier = _pretraining(params, config, device, output)
        objective = build_objective(section, image, config, prior, seed, teacher, params.encoder, start)
        inputs = [SPLIT / "train.parquet", PRIOR, *([EMBEDDINGS_INDEX] if config.encoder else [])]
        inputs += [teacher / WEIGHTS] if getattr(objective, "teacher", None) is not None else []
        inputs += [TEXT / FEATURES_FILE] if section.uses_text else []
        result = train_network("student", objective, config, params, prior, device, output, inputs, earlier)
        if rotation and rank() == 0:
            rotation.clear()
        return result


def _pretraining(
    params: Params, config: ModelConfig, device: torch.device, output: Path
) -> tuple[RunFolder, dict[str, Tensor], History]:
    """Train the student's network to recognise rotations; resumes, and is not repeated once it has ended.

    Returns the folder of its checkpoints, which is beside `output`, the weights of the backbone on the CPU, and its epochs.
    """
    augment = params.student.augment.model_copy(update={"mix": "none"})
    section = params.student.model_copy(update={"augment": augment})
    seed = stage_seed(params.seed, "rotation")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        objective = RotationObjective(build_model(replace(config, classes=ANGLES), "student.backbone"))
    inputs = [SPLIT / "train.parquet"]
    rotation = output.with_name(f"{output.name}.rotation")
    folder = run_folder(section, params.image, params.engine, params.stream, params.seed, rotation, inputs)
    training = Training("student", objective, section, params.image, seed, device, folder, params.engine)
    train, _, notice = training_inputs(params, "student", device, augment=augment, views=1)
    if rank() == 0:
        print(f"student  pretraining by rotations{f'; {notice}' if notice else ''}", flush=True)
    size = params.image.size
    nothing = Images(torch.zeros(0, 3, size, size, dtype=torch.uint8), torch.zeros(0).long(), [], [], None)
    history = training.run(train, nothing)
    # Not the training: its images and its state would stay on the device.
    return folder, {name: tensor.cpu() for name, tensor in training.model.backbone.state_dict().items()}, history


def _train_segmentation(params: Params, prior: Prior, output: Path, teacher: Path) -> Result:
    """As `run`, for task segmentation: L_cls of both heads and L_GML of sampled cells."""
    section = params.student
    check_recipe(params.teacher, section, prior)
    objectives.check_dilated(params)
    config = model_config(section, params.image, len(prior.classes), segmentation=params.segmentation)
    with joined_ranks(params.device) as device:
        frozen, seed = objectives.load_teacher(params, teacher), stage_seed(params.seed, "student")
        objective = objectives.student_objective(params, config, prior, seed, frozen)
        inputs = [SPLIT / "train.parquet", PRIOR, *([teacher / WEIGHTS] if frozen is not None else [])]
        return train_network("student", objective, config, params, prior, device, output, inputs)


if __name__ == "__main__":
    sys.exit(stage_main(run, "Train the student: GML loss against the teacher's class-wise queues."))
