"""Stage `teacher`: train the teacher with the logit-adjusted cross-entropy; writes artifacts/teacher/."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.command_line import stage_main
from pipeline.data.class_prior import load_prior
from pipeline.features.stored import stored_encoder
from pipeline.model_io.devices import joined_ranks
from pipeline.params import Params
from pipeline.shared.artifacts import EMBEDDINGS_INDEX, PRIOR, SPLIT, TEACHER
from pipeline.training import segmentation_setup
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
        return segmentation_setup.train_teacher(params, prior, output)
    check_recipe(section, params.student, prior)
    check_backbones(section.backbone, params.student.backbone, params.image.size, params.export.opset)
    check_tuning(params.encoder, params.student)
    config = model_config(section, params.image, len(prior.classes), stored_encoder(params))
    with joined_ranks(params.device) as device:
        objective = teacher_objective(section, config, prior, stage_seed(params.seed, "teacher"))
        inputs = [SPLIT / "train.parquet", PRIOR, *([EMBEDDINGS_INDEX] if config.encoder else [])]
        return train_network("teacher", objective, config, params, prior, device, output, inputs)


if __name__ == "__main__":
    sys.exit(stage_main(run, "Train the teacher: cosine classifier, logit-adjusted cross-entropy."))
