"""Stage `student`: train the student against the frozen teacher's class-wise queues; writes artifacts/student/."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from models.cosine_classifier import ImageClassifier
from models.ranks import rank
from models.student_objective import StudentObjective, StudentWeights
from pipeline.artifacts import PRIOR, SPLIT, STUDENT, TEACHER
from pipeline.checkpoint import WEIGHTS, build_model, check_image, load_model
from pipeline.dataset import training_images
from pipeline.params import Params, StudentParams
from pipeline.pretrained import start_from
from pipeline.prior import Prior, load_prior
from pipeline.ranks import joined_ranks
from pipeline.stage import stage_main
from pipeline.training_run import (
    Result,
    check_backbones,
    check_recipe,
    make_training,
    model_config,
    run_folder,
    save_run,
    stage_seed,
)
from serving.terminal import print


def run(params: Params, output: Path = STUDENT, teacher: Path = TEACHER) -> Result:
    """Train the student on three views with gamma·L_cls + beta·(L_GML + L_tau) + alpha·L_KD, last epoch kept. An interrupted
    run goes on where it was. A teacher that no term needs is not read (alpha 0 and contrast_encoder momentum, say).

    Raises ParamsError when the queues cannot hold queue_minimum rows of every class.
    """
    prior = load_prior()
    check_recipe(params, prior)
    check_backbones(params)
    config = model_config(params.student, params, len(prior.classes))
    with joined_ranks(params.device) as device:
        objective = build_objective(params, prior, teacher)
        inputs = [SPLIT / "train.parquet", PRIOR, *([teacher / WEIGHTS] if objective.teacher is not None else [])]
        folder = run_folder(params.student, params, output, *inputs)
        training = make_training("student", objective, params, prior, device, folder)
        train, validation, said = training_images(params, device, augment=params.student.augment, views=objective.views)
        if said and rank() == 0:
            print(f"student  {said}", flush=True)
        history = training.run(train, validation)
        return save_run(training, config, history, output)


def build_objective(params: Params, prior: Prior, teacher: Path) -> StudentObjective:
    """The student's objective, freshly initialised from the stage's seed, its teacher read from a folder if a term needs it."""
    student = params.student
    config = model_config(student, params, len(prior.classes))
    frozen, taught = None, None
    if weights_of(student).need_teacher(student.contrast_encoder):
        frozen, trained = load_model(teacher, "teacher")
        check_image(trained, params.image, teacher)
        taught = trained.adjustment
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stage_seed(params.seed, "student"))
        model = build_model(config, "student.backbone")
        start_from(model.backbone, student.pretrained, "student.pretrained")
        return student_objective(params, prior, model, frozen, taught)


def student_objective(
    params: Params,
    prior: Prior,
    model: ImageClassifier,
    teacher: ImageClassifier | None,
    teacher_adjustment: float | None = None,
) -> StudentObjective:
    """The objective of params.student around a network and its teacher, whose L_cls had teacher_adjustment."""
    student = params.student
    return StudentObjective(
        model,
        teacher,
        torch.tensor(prior.in_losses),
        prior.counts,
        weights_of(student),
        tau_g=student.tau_g,
        train_tau_g=student.train_tau_g,
        queue_total=student.queue_total,
        queue_minimum=student.queue_minimum,
        projection_dim=student.projection_dim,
        contrast_encoder=student.contrast_encoder,
        encoder_momentum=student.encoder_momentum,
        teacher_adjustment=teacher_adjustment,
    )


def weights_of(student: StudentParams) -> StudentWeights:
    """The weights of its terms."""
    return StudentWeights(
        student.gamma,
        student.beta,
        student.alpha,
        student.distillation_temperature,
        student.prior_strength,
        student.adjustment,
    )


if __name__ == "__main__":
    sys.exit(stage_main(run, "Train the student: GML loss against the teacher's class-wise queues."))
