"""benchmarks.encoder_heads: smoke test at a small size; no time is asserted."""

from __future__ import annotations

import re

import pytest
import torch
import yaml

from benchmarks import encoder_heads
from tests.support.project import ROOT

SMALL = {"epochs": 8, "batch_size": 8, "schedule": {"warmup_epochs": 1}}


@pytest.fixture
def heads(tmp_path, monkeypatch):
    monkeypatch.setattr(encoder_heads, "CLASSES", 4)
    monkeypatch.setattr(encoder_heads, "WIDTH", 16)
    monkeypatch.setattr(encoder_heads, "COUNTS", [40, 20, 10, 5])
    monkeypatch.setitem(encoder_heads.ENCODER, "width", 16)
    recipe = tmp_path / "small.yaml"
    student = {**SMALL, "adapter": 8, "projection_hidden": 8, "queue_total": 32, "beta": 1.0}
    overlay = {"extends": str(ROOT / "recipes/photographs-lite0.yaml"), "teacher": SMALL, "student": student}
    recipe.write_text(yaml.safe_dump(overlay))
    return recipe


def test_the_report_has_seconds_losses_and_accuracies_of_teacher_student_and_logistic_regression(heads, capsys):
    pytest.importorskip("sklearn")
    encoder_heads.report(heads)
    printed = capsys.readouterr().out
    assert re.search(r"^75 features of 16 values, 4 classes", printed)
    rows = re.findall(r"^(\w+): [\d.]+ s .*; balanced loss ([\d.]+), accuracy ([\d.]+)%", printed, re.MULTILINE)
    assert [name for name, *_ in rows] == ["teacher", "student", "LogisticRegression"]
    losses = {name: float(loss) for name, loss, _ in rows}
    assert losses["LogisticRegression"] <= losses["teacher"]


def test_the_balanced_loss_weighs_each_class_the_same(heads):
    compared = encoder_heads.Heads(heads)
    logits = torch.zeros(75, 4)
    logits[:, 0] = 2.0  # correct for 40 images of the first class, wrong for all others
    right, wrong = (-logits[0].log_softmax(0)[label].item() for label in (0, 1))
    assert compared.balanced_loss(logits) == pytest.approx((right + 3 * wrong) / 4)
