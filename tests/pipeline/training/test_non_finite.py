"""Loss means over an epoch, and detection of the first non-finite loss part with its step and name."""

from __future__ import annotations

import json
import math

import pytest
import safetensors.torch
import torch

from pipeline.shared.errors import StageError
from pipeline.training.non_finite import WINDOW, Failure, NonFiniteMonitor
from pipeline.training.resume import RunFolder
from tests.support.small_training import CPU, made_images, made_training


def parts(loss: float, gml: float) -> dict[str, torch.Tensor]:
    return {"loss": torch.tensor(loss), "gml": torch.tensor(gml)}


def test_means_are_those_of_the_epoch_also_when_it_was_resumed():
    monitor = NonFiniteMonitor(CPU)
    monitor.begin()
    assert monitor.add(0, None, parts(1.0, 4.0)) is None
    kept = monitor.checkpoint_sums()
    again = NonFiniteMonitor(CPU)
    again.begin(kept)
    again.add(1, None, parts(3.0, 0.0))
    assert again.means(2) == {"loss": 2.0, "gml": 2.0}


def test_a_value_that_is_not_finite_is_reported_at_its_step_by_its_name():
    monitor = NonFiniteMonitor(CPU)
    monitor.begin()
    for step in range(WINDOW + 5):
        assert monitor.add(step, None, parts(1.0, 1.0)) is None
    assert monitor.add(WINDOW + 5, None, parts(1.0, math.inf)) == Failure(WINDOW + 5, ["gml"])
    assert monitor.last_failure() == Failure(WINDOW + 5, ["gml"])
    recent = monitor.recent(WINDOW + 5)
    assert [entry["step"] for entry in recent] == list(range(6, WINDOW + 6))
    assert recent[-1]["gml"] == math.inf


def test_another_epoch_begins_without_the_failures_of_the_last():
    monitor = NonFiniteMonitor(CPU)
    monitor.begin()
    monitor.add(0, None, parts(math.nan, 1.0))
    monitor.begin()
    assert monitor.add(0, None, parts(1.0, 1.0)) is None and monitor.last_failure() is None


def test_a_run_that_fails_stops_at_the_step_and_leaves_its_batch_and_state(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    training = made_training("student", run_folder=RunFolder(tmp_path / "unfinished", "run"))
    forward, calls = training.objective.forward, []

    def poisoned(*arguments):
        losses = forward(*arguments)
        calls.append(arguments[2].tolist())
        if len(calls) == 8:  # five steps per epoch: step 3 of epoch 2
            losses["gml"] = losses["gml"] * math.nan
            losses["loss"] = losses["loss"] * math.nan
        return losses

    training.objective.forward = poisoned
    with pytest.raises(StageError, match=r"student: not finite in epoch 2, step 3 of 5: loss, gml, gradient_norm; "):
        training.run(made_images(40), made_images(9, seed=1))
    folder = tmp_path / "failures/student"  # beside the run
    content = json.loads((folder / "failure.json").read_text())
    assert (content["step"], content["epoch"], content["terms"]) == (3, 2, ["loss", "gml", "gradient_norm"])
    assert content["sample_ids"] == [str(i) for i in calls[7]]
    assert [entry["gml"] == "nan" for entry in content["recent"]] == [False, False, True]
    tensors = safetensors.torch.load_file(folder / "tensors.safetensors")
    assert tensors["views"].shape == (3, 8, 3, 8, 8) and tensors["views"].dtype == torch.uint8
    assert "objective.log_tau_g" in tensors
    # The checkpoint of the last good epoch remains, and a run with a corrected recipe starts from scratch.
    assert RunFolder(tmp_path / "unfinished", "run").load().state["epoch"] == 1
