"""Teacher and student of task segmentation: objectives from params, checks before training, training."""

from __future__ import annotations

from pathlib import Path

import torch

from models.networks.backbones import UnknownBackboneError
from models.segmentation.contrast import CellContrast
from models.segmentation.dilated import dilated_backbone
from models.segmentation.network import SegmentationModel
from models.segmentation.objective import SegmentationObjective, SegmentationWeights
from pipeline.data.class_prior import Prior
from pipeline.model_io.checkpoint import WEIGHTS, ModelConfig, build_model, check_canvas, check_image, load_model
from pipeline.model_io.devices import joined_ranks
from pipeline.model_io.pretrained import load_pretrained
from pipeline.params import Params, StudentParams, TrainingParams
from pipeline.segmentation.dataset import segmentation_of
from pipeline.shared.artifacts import PRIOR, SPLIT
from pipeline.shared.errors import ParamsError
from pipeline.training.run import Result, check_recipe, model_config, stage_seed, train_network


def train_teacher(params: Params, prior: Prior, output: Path) -> Result:
    """Train the teacher by L_cls of both heads; saves the last epoch. Resumes an interrupted run."""
    check(params, prior)
    section = params.teacher
    config = model_config(section, params.image, len(prior.classes), segmentation=segmentation_of(params))
    with joined_ranks(params.device) as device:
        model = _initialised(section, config, "teacher", stage_seed(params.seed, "teacher"))
        objective = SegmentationObjective(model, torch.tensor(prior.in_losses), loss_weights(params, section))
        return train_network(
            "teacher", objective, config, params, prior, device, output, [SPLIT / "train.parquet", PRIOR]
        )


def train_student(params: Params, prior: Prior, output: Path, teacher: Path) -> Result:
    """Train the student by L_cls of both heads and L_GML of sampled cells; saves the last epoch. Resumes.

    The teacher is loaded only if it fills the queues (contrast_encoder teacher, beta above 0).
    """
    check(params, prior)
    section = params.student
    config = model_config(section, params.image, len(prior.classes), segmentation=segmentation_of(params))
    with joined_ranks(params.device) as device:
        frozen, inputs = None, [SPLIT / "train.parquet", PRIOR]
        if section.beta and section.contrast_encoder == "teacher":
            frozen, trained = load_model(teacher, "teacher")
            check_image(trained, params.image, teacher)
            check_canvas(trained, params, teacher)
            inputs.append(teacher / WEIGHTS)
        objective = student_objective(params, config, prior, frozen)
        return train_network("student", objective, config, params, prior, device, output, inputs)


def student_objective(
    params: Params, config: ModelConfig, prior: Prior, teacher: SegmentationModel | None
) -> SegmentationObjective:
    """Objective of params.student, initialised from the stage's seed. teacher: frozen contrast encoder; None: self."""
    section, settings, seed = params.student, segmentation_of(params), stage_seed(params.seed, "student")
    model, contrast = _initialised(section, config, "student", seed), None
    if section.beta:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            contrast = CellContrast(
                model.feature_dim, (teacher or model).feature_dim, prior.counts,
                tau_g=section.tau_g, prior_strength=section.prior_strength,
                queue_total=section.queue_total, queue_minimum=section.queue_minimum,
                queries=settings.queries, keys=settings.keys, keys_per_class=settings.keys_per_class,
                projection_hidden=section.projection_hidden, projection_dim=section.projection_dim,
            )  # fmt: skip
    weights = loss_weights(params, section, section.gamma, section.beta)
    return SegmentationObjective(model, torch.tensor(prior.in_losses), weights, contrast, teacher)


def loss_weights(params: Params, section: TrainingParams, gamma: float = 1.0, beta: float = 0.0) -> SegmentationWeights:
    """Weights of the terms of a stage's loss."""
    settings = segmentation_of(params)
    return SegmentationWeights(gamma, beta, settings.auxiliary, section.adjustment, settings.average)


def check(params: Params, prior: Prior) -> None:
    """Raise ParamsError for errors that would appear only after the teacher's training: backbones, too small queues."""
    check_recipe(params.teacher, params.student, prior)
    sections: dict[str, TrainingParams | StudentParams] = {"teacher": params.teacher, "student": params.student}
    for name, section in sections.items():
        try:
            with torch.device("meta"):
                dilated_backbone(section.backbone)
        except UnknownBackboneError as error:
            raise ParamsError(f"{name}.backbone: {error}") from None


def _initialised(section: TrainingParams, config: ModelConfig, name: str, seed: int) -> SegmentationModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(config, f"{name}.backbone")
    load_pretrained(model.backbone, section.pretrained, f"{name}.pretrained")
    return model
