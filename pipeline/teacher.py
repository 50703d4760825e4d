"""Stage `teacher`: train the teacher with the logit-adjusted cross-entropy; writes artifacts/teacher/."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from models.classification_objective import TeacherObjective
from models.ranks import rank
from pipeline.artifacts import PRIOR, SPLIT, TEACHER
from pipeline.checkpoint import build_model
from pipeline.dataset import training_images
from pipeline.params import Params
from pipeline.pretrained import start_from
from pipeline.prior import load_prior
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


def run(params: Params, output: Path = TEACHER) -> Result:
    """Train the teacher on one view with L_cls (Eq. 6), last epoch kept. An interrupted run goes on where it was."""
    prior = load_prior()
    check_recipe(params, prior)
    check_backbones(params)
    config = model_config(params.teacher, params, len(prior.classes))
    with joined_ranks(params.device) as device:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stage_seed(params.seed, "teacher"))
            model = build_model(config, "teacher.backbone")
        start_from(model.backbone, params.teacher.pretrained, "teacher.pretrained")
        objective = TeacherObjective(model, torch.tensor(prior.in_losses), params.teacher.adjustment)
        folder = run_folder(params.teacher, params, output, SPLIT / "train.parquet", PRIOR)
        training = make_training("teacher", objective, params, prior, device, folder)
        train, validation, said = training_images(params, device, augment=params.teacher.augment, views=objective.views)
        if said and rank() == 0:
            print(f"teacher  {said}", flush=True)
        history = training.run(train, validation)
        return save_run(training, config, history, output)


if __name__ == "__main__":
    sys.exit(stage_main(run, "Train the teacher: cosine classifier, logit-adjusted cross-entropy."))
