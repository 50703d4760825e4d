"""All stages on two classes of two images each, with the params that `tailor init` proposes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import pipeline.demo.baseline
import pipeline.embed
import pipeline.evaluate
import pipeline.export
import pipeline.prior
import pipeline.split
import pipeline.student
import pipeline.teacher
from pipeline.onnx_export.release import open_session
from pipeline.params import parse_params
from pipeline.preparation.encoder_choice import choose_encoder
from pipeline.preparation.first_params import FROM_SCRATCH, suggest_params, write_text
from pipeline.preparation.folder_summary import inspect_folder
from pipeline.shared.artifacts import EXPORT
from tests.support.chosen_params import TEMPLATE
from tests.support.making import folder
from tests.support.small_encoder import tiny_package

STAGES = (
    pipeline.split, pipeline.prior, pipeline.embed, pipeline.teacher, pipeline.student, pipeline.evaluate, pipeline.export,
)  # fmt: skip
QUICK = {"backbone": "resnet20", "epochs": 1}  # saves time


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["tiny", None])
def test_two_classes_of_two_images_are_trained_evaluated_and_exported(tmp_path, monkeypatch, capsys, encoder):
    tiny_package(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    summary = inspect_folder(folder(tmp_path / "images", {"a": 2, "b": 2}))
    choice = choose_encoder(summary, encoder, torch.device("cpu")) if encoder else FROM_SCRATCH
    content = yaml.safe_load(write_text(TEMPLATE, suggest_params(summary, "images", gpu=False, choice=choice))[0])
    if not encoder:
        content["teacher"] |= QUICK
        content["student"] |= QUICK
    params = parse_params(content, Path("params.yaml"))
    for stage in STAGES:
        stage.run(params)
    assert "2 test images, fewer than 100: figures are uncertain by up to ±69" in capsys.readouterr().err
    metrics = json.loads(Path("artifacts/evaluation/metrics/student_balanced.json").read_text(encoding="utf-8"))
    assert metrics["test_images"] == 2 and metrics["balanced_accuracy"] in (0, 0.5, 1)
    assert "2 test images" in Path("artifacts/evaluation/report.html").read_text(encoding="utf-8")
    pixels = np.zeros((1, 3, params.image.size, params.image.size), np.uint8)
    inputs = {"image": pixels, "strength": np.zeros((1, 1), np.float32)}
    assert np.isfinite(open_session(EXPORT / "student.onnx").run(["logits"], inputs)[0]).all()
    assert pipeline.demo.baseline.run(params).images == 2
