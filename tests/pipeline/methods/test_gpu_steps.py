"""The training step of every method on a GPU, tested without one: it can be captured, and it is on one device."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models.networks.cosine_classifier import ImageClassifier
from models.objectives.objective import Objective
from models.objectives.rotation import ANGLES, RotationObjective
from pipeline.methods.catalogue import METHODS, find_methods, params_of
from pipeline.params import Params
from pipeline.preparation.gpu_memory import new_objective, tuned_record
from pipeline.training.step import Step
from tests.pipeline.methods.test_catalogue import SMALL, small_prior
from tests.support.gpu_checks import check_capture, check_device
from tests.support.making import params
from tests.support.small_encoder import tiny_encoder, tiny_params
from tests.support.small_training import CPU, made_images

pytestmark = pytest.mark.slow
NETWORKS = {"teacher.backbone": "resnet8", "student.backbone": "resnet8"}
AUGMENT = "student.augment."
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{method.name: (method.name, {}) for method in METHODS if method.kind != "second stage"},
    "autoaugment and stacked, cutmix": (
        "gml",
        {
            AUGMENT + "policy": "autoaugment", AUGMENT + "contrast_policy": "stacked", AUGMENT + "mix": "cutmix",
            AUGMENT + "crop": "resized", AUGMENT + "bicubic": True, "student.ema_decay": 0.9,
        },
    ),
    "randaugment and simaugment, mixup": (
        "gml",
        {
            AUGMENT + "policy": "randaugment", AUGMENT + "contrast_policy": "simaugment", AUGMENT + "mix": "mixup",
            AUGMENT + "bicubic": True, "student.accumulate": 2,
        },
    ),
    "momentum encoder, adamw, clipped": (
        "gml",
        {
            "student.contrast_encoder": "momentum", "student.optimizer": "adamw", "student.learning_rate": 1e-4,
            "student.gradient_clip": 1.0, "engine.checkpoint_activations": True,
        },
    ),
}  # fmt: skip
cases = pytest.mark.parametrize("case", list(CASES))


def made(case: str) -> tuple[Params, Objective]:
    name, changes = CASES[case]
    (method,) = find_methods([name])
    chosen = params_of(method, params({**SMALL, **NETWORKS, **changes}))
    return chosen, new_objective(chosen, "student", small_prior())


@cases
def test_a_captured_step_does_what_the_plain_one_does_in_every_epoch(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, objective = made(case)
    recompute = chosen.engine.checkpoint_activations
    plain, captured = (
        Step(each, chosen.student, chosen.image, made_images(32), CPU, checkpoint_activations=recompute)
        for each in (objective, copy.deepcopy(objective))
    )
    check_capture(monkeypatch, plain, captured, chosen.student, 32)


@cases
def test_a_step_uses_one_device_and_reads_no_value_on_the_host(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, objective = made(case)
    check_device(monkeypatch, objective, chosen.student, chosen.image, made_images(32), begins_epochs=case != "tsc")


def test_the_rotations_of_ssps_pretraining_run_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    section, image = params({**SMALL, **NETWORKS}).student, params(SMALL).image
    objective = RotationObjective(ImageClassifier("resnet8", ANGLES, 1 / 30))
    steps = [Step(each, section, image, made_images(32), CPU) for each in (objective, copy.deepcopy(objective))]
    check_capture(monkeypatch, *steps, section, 32)
    check_device(monkeypatch, objective, section, image, made_images(32))


@pytest.mark.parametrize("tune", ["last_blocks", "lora", "adaptformer", "all"])
def test_a_student_that_tunes_its_encoder_runs_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tune: str
) -> None:
    small = {
        "student.tune": tune,
        "student.queue_total": 30,
        "student.optimizer": "adamw",
        "student.learning_rate": 1e-4,
    }
    given = tiny_params(tiny_encoder(tmp_path, monkeypatch), tmp_path, small)
    section, image = given.student, given.image
    objective = new_objective(given, "student", small_prior(), tuned_record(given, "student"))
    pixels = torch.randint(256, (32, 3, 32, 32), dtype=torch.uint8)
    train = replace(made_images(32), images=pixels)
    steps = [Step(each, section, image, train, CPU) for each in (objective, copy.deepcopy(objective))]
    check_capture(monkeypatch, *steps, section, 32)
    check_device(monkeypatch, objective, section, image, train)
