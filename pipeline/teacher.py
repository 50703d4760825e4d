"""Stage `teacher`: train the teacher with the logit-adjusted cross-entropy; writes artifacts/teacher/."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from models.objectives import TeacherObjective
from pipeline.artifacts import TEACHER, whole_folder, write_file
from pipeline.checkpoint import ModelConfig, build_model, save_model
from pipeline.dataset import load_images
from pipeline.params import Params, TrainingParams
from pipeline.prior import load_prior
from pipeline.stage import stage_main
from pipeline.training import Training, as_csv, as_jsonl, choose_device


@dataclass(frozen=True)
class Result:
    """The last epoch of a training stage."""

    last: dict[str, float]
    output: Path

    def __str__(self) -> str:
        score = f", validation {self.last['validation_accuracy']:.1%}" if "validation_accuracy" in self.last else ""
        return f"{self.last['epoch']} epochs, loss {self.last['loss']:.4f}{score} → {self.output}"


def model_config(section: TrainingParams, params: Params, classes: int) -> ModelConfig:
    """The config of a network trained by a params section."""
    image = params.image
    return ModelConfig(section.backbone, classes, section.tau_s, image.size, image.mean, image.std)


def save_run(training: Training, config: ModelConfig, history: list[dict[str, float]], output: Path) -> Result:
    """Write network, config and history as one whole folder."""
    with whole_folder(output) as folder:
        save_model(training.objective.model, config, folder)
        write_file(folder / "metrics.jsonl", as_jsonl(history))
        write_file(folder / "history.csv", as_csv(history))
    return Result(history[-1], output)


def run(params: Params, output: Path = TEACHER) -> Result:
    """Train the teacher on one view with L_cls (Eq. 6), last epoch kept."""
    prior = load_prior()
    config = model_config(params.teacher, params, len(prior.classes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(params.seed)
        model = build_model(config, "teacher.backbone")
    objective = TeacherObjective(model, torch.tensor(prior.log_prior))
    training = Training("teacher", objective, params.teacher, params.image, params.seed, choose_device(params.device))
    history = training.run(load_images(params, "train"), load_images(params, "validation"))
    return save_run(training, config, history, output)


if __name__ == "__main__":
    sys.exit(stage_main(run, "Train the teacher: cosine classifier, logit-adjusted cross-entropy."))
