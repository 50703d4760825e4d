"""Stage `teacher`: train the teacher with the logit-adjusted cross-entropy; writes artifacts/teacher/."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.command_line import stage_main
from pipeline.data.class_prior import Prior, load_prior
from pipeline.features.stored import stored_encoder
from pipeline.model_io.devices import joined_ranks
from pipeline.params import Params
from pipeline.segmentation import objectives
from pipeline.shared.artifacts import EMBEDDINGS_INDEX, PRIOR, SPLIT, TEACHER
from pipeline.training.run import (
    Result,
    check_backbones,
    check_recipe,
    model_config,
    stage_seed,
    teacher_objective,
    train_network,
)
from pipeline.training.student_setup import check_tuning


def run(params: Params, output: Path = TEACHER) -> Result:
    """Train the teacher on one view with L_cls (Eq. 6); saves the last epoch. Resumes an interrupted run."""
    prior, section = load_prior(), params.teacher
    if params.segmentation:
        return _train_segmentation(params, prior, output)
    check_recipe(section, params.student, prior)
    check_backbones(section.backbone, params.student.backbone, params.image.size, params.export.opset)
    check_tuning(params.encoder, params.student)
    config = model_config(section, params.image, len(prior.classes), stored_encoder(params))
    with joined_ranks(params.device) as device:
        objective = teacher_objective(section, config, prior, stage_seed(params.seed, "teacher"))
        inputs = [SPLIT / "train.parquet", PRIOR, *([EMBEDDINGS_INDEX] if config.encoder else [])]
        return train_network("teacher", objective, config, params, prior, device, output, inputs)


def _train_segmentation(params: Params, prior: Prior, output: Path) -> Result:
    """As `run`, for task segmentation: L_cls of both heads."""
    section = params.teacher
    check_recipe(section, params.student, prior)
    objectives.check_dilated(params)
    config = model_config(section, params.image, len(prior.classes), segmentation=params.segmentation)
    with joined_ranks(params.device) as device:
        objective = objectives.teacher_objective(params, config, prior, stage_seed(params.seed, "teacher"))
        inputs = [SPLIT / "train.parquet", PRIOR]
        return train_network("teacher", objective, config, params, prior, device, output, inputs)


if __name__ == "__main__":
    sys.exit(stage_main(run, "Train the teacher: cosine classifier, logit-adjusted cross-entropy."))
