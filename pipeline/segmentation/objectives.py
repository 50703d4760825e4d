"""Objectives of teacher and student of task segmentation from params, and checks before training."""

from __future__ import annotations

from pathlib import Path

import torch

from models.networks.backbones import UnknownBackboneError
from models.segmentation.contrast import CellContrast
from models.segmentation.dilated import dilated_backbone
from models.segmentation.network import SegmentationModel
from models.segmentation.objective import SegmentationObjective, SegmentationWeights
from pipeline.data.class_prior import Prior
from pipeline.model_io.checkpoint import ModelConfig, build_model, check_canvas, check_image, load_model
from pipeline.model_io.pretrained import load_pretrained
from pipeline.params import Params, TrainingParams
from pipeline.segmentation.dataset import segmentation_of
from pipeline.shared.errors import ParamsError


def teacher_objective(params: Params, config: ModelConfig, prior: Prior, seed: int) -> SegmentationObjective:
    """Objective of params.teacher, L_cls of both heads, initialised from the stage's seed."""
    model = _initialised(params.teacher, config, "teacher", seed)
    return SegmentationObjective(model, torch.tensor(prior.in_losses), loss_weights(params, params.teacher))


def load_teacher(params: Params, folder: Path) -> SegmentationModel | None:
    """The frozen teacher whose features fill the queues; None if no loss term of the student needs it."""
    section = params.student
    if not section.beta or section.contrast_encoder != "teacher":
        return None
    model, config = load_model(folder, "teacher")
    check_image(config, params.image, folder)
    check_canvas(config, params, folder)
    return model


def student_objective(
    params: Params, config: ModelConfig, prior: Prior, seed: int, teacher: SegmentationModel | None
) -> SegmentationObjective:
    """Objective of params.student, initialised from the stage's seed. teacher: frozen contrast encoder; None: self."""
    section, settings = params.student, segmentation_of(params)
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


def check_dilated(params: Params) -> None:
    """Raise ParamsError when a backbone has no dilated form. Called before the teacher is trained."""
    sections: dict[str, TrainingParams] = {"teacher": params.teacher, "student": params.student}
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
