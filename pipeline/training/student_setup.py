"""Construction of the student's objective and loss weights from params."""

from __future__ import annotations

from pathlib import Path

import torch

from models.networks.cosine_classifier import ImageClassifier
from models.objectives.student import StudentObjective
from models.objectives.student_weights import StudentWeights
from pipeline.data.class_prior import Prior
from pipeline.model_io.checkpoint import ModelConfig, build_model, check_encoder, check_image, load_model
from pipeline.model_io.pretrained import load_pretrained
from pipeline.params import ImageParams, StudentParams


def build_objective(
    section: StudentParams, image: ImageParams, config: ModelConfig, prior: Prior, seed: int, teacher: Path
) -> StudentObjective:
    """Build the student's objective from the stage's seed.

    The teacher is loaded from its folder if a loss term needs it.
    """
    weights, frozen, teacher_adjustment = weights_of(section), None, None
    if weights.needs_teacher(section.contrast_encoder):
        frozen, trained = load_model(teacher, "teacher")
        check_image(trained, image, teacher)
        check_encoder(trained, config.encoder, teacher)
        teacher_adjustment = trained.adjustment
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(config, "student.backbone")
        load_pretrained(model.backbone, section.pretrained, "student.pretrained")
        return student_objective(section, weights, prior, model, frozen, teacher_adjustment)


def student_objective(
    section: StudentParams,
    weights: StudentWeights,
    prior: Prior,
    model: ImageClassifier,
    teacher: ImageClassifier | None,
    teacher_adjustment: float | None = None,
) -> StudentObjective:
    """The objective of params.student for a network and its teacher; teacher_adjustment: of the teacher's L_cls."""
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
        projection_hidden=section.projection_hidden,
        contrast_encoder=section.contrast_encoder,
        encoder_momentum=section.encoder_momentum,
        teacher_adjustment=teacher_adjustment,
    )


def weights_of(section: StudentParams) -> StudentWeights:
    """Weights of the student's loss terms from params."""
    return StudentWeights(
        section.gamma,
        section.beta,
        section.alpha,
        section.distillation_temperature,
        section.prior_strength,
        section.adjustment,
    )
