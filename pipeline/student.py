"""Stage `student`: train the student against the frozen teacher's class-wise queues; writes artifacts/student/."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from models.cosine_classifier import ImageClassifier
from models.student_objective import StudentObjective, StudentWeights
from pipeline.artifacts import PRIOR, SPLIT, STUDENT, TEACHER
from pipeline.checkpoint import WEIGHTS, ModelConfig, build_model, check_image, load_model
from pipeline.params import ImageParams, Params, StudentParams
from pipeline.pretrained import start_from
from pipeline.prior import Prior, load_prior
from pipeline.ranks import joined_ranks
from pipeline.stage import stage_main
from pipeline.training_run import (
    Result,
    check_backbones,
    check_recipe,
    model_config,
    stage_seed,
    train_network,
)


def run(params: Params, output: Path = STUDENT, teacher: Path = TEACHER) -> Result:
    """Train the student on three views with gamma·L_cls + beta·(L_GML + L_tau) + alpha·L_KD and keep the last epoch.

    An interrupted run is resumed. A teacher that no term needs is not read (with alpha 0 and contrast_encoder momentum).
    Raises ParamsError when the queues cannot hold queue_minimum rows of every class.
    """
    prior, section, image = load_prior(), params.student, params.image
    check_recipe(params.teacher, section, prior)
    check_backbones(params.teacher.backbone, section.backbone, image.size, params.export.opset)
    config = model_config(section, image, len(prior.classes))
    with joined_ranks(params.device) as device:
        objective = build_objective(section, image, config, prior, stage_seed(params.seed, "student"), teacher)
        inputs = [SPLIT / "train.parquet", PRIOR, *([teacher / WEIGHTS] if objective.teacher is not None else [])]
        return train_network("student", objective, config, params, prior, device, output, inputs)


def build_objective(
    section: StudentParams, image: ImageParams, config: ModelConfig, prior: Prior, seed: int, teacher: Path
) -> StudentObjective:
    """The student's objective, freshly initialised from the stage's seed; the teacher is read from its folder if a term
    needs it."""
    weights, frozen, teacher_adjustment = weights_of(section), None, None
    if weights.need_teacher(section.contrast_encoder):
        frozen, trained = load_model(teacher, "teacher")
        check_image(trained, image, teacher)
        teacher_adjustment = trained.adjustment
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(config, "student.backbone")
        start_from(model.backbone, section.pretrained, "student.pretrained")
        return student_objective(section, weights, prior, model, frozen, teacher_adjustment)


def student_objective(
    section: StudentParams,
    weights: StudentWeights,
    prior: Prior,
    model: ImageClassifier,
    teacher: ImageClassifier | None,
    teacher_adjustment: float | None = None,
) -> StudentObjective:
    """The objective of params.student around a network and its teacher, whose L_cls had teacher_adjustment."""
    return StudentObjective(
        model,
        teacher,
        torch.tensor(prior.in_losses),
        prior.counts,
        weights,
        tau_g=section.tau_g,
        train_tau_g=section.train_tau_g,
        queue_total=section.queue_total,
        queue_minimum=section.queue_minimum,
        projection_dim=section.projection_dim,
        contrast_encoder=section.contrast_encoder,
        encoder_momentum=section.encoder_momentum,
        teacher_adjustment=teacher_adjustment,
    )


def weights_of(section: StudentParams) -> StudentWeights:
    """The weights of the student's terms."""
    return StudentWeights(
        section.gamma,
        section.beta,
        section.alpha,
        section.distillation_temperature,
        section.prior_strength,
        section.adjustment,
    )


if __name__ == "__main__":
    sys.exit(stage_main(run, "Train the student: GML loss against the teacher's class-wise queues."))
