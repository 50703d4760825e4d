"""An interrupted run resumes from its checkpoint and ends bit-identical to an uninterrupted one."""

from __future__ import annotations

import random

import pytest
import torch

from pipeline.params import AugmentParams
from pipeline.training.engine import Training
from pipeline.training.resume import RunFolder, Snapshot
from tests.support.making import ROOT
from tests.support.small_training import PowerCut, made_images, made_training

pytestmark = pytest.mark.slow


def cut_off(training: Training, after: int) -> None:
    """Interrupt the run after `after` further steps."""
    forward, done = training.objective.forward, []

    def counted(*arguments):
        if len(done) == after:
            raise PowerCut
        done.append(1)
        return forward(*arguments)

    training.objective.forward = counted
    with pytest.raises(PowerCut):
        training.run(made_images(40), made_images(9, seed=1))


def result(training: Training) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Return the final state of a run including its best network, and its history without times."""
    history = training.run(made_images(40), made_images(9, seed=1))
    best = {f"best.{name}": tensor for name, tensor in training.best.weights.items()}
    return {**training.step.state(), **best}, [
        {k: v for k, v in r.items() if k not in ("images_per_second", "memory_mib")} for r in history
    ]


RECIPES = {
    "teacher": {},
    "student": {},
    "momentum": {},
    "deferred": {},
    "proco": {},
    "kcl": {},
    "tsc": {},  # which matches classes and targets between epochs
    "hybrid": {},  # which draws a second batch
    "experts": {},  # whose loss changes halfway
    "bbn": {},  # which draws a second batch
    "averaged": {"ema_decay": 0.9, "augment": AugmentParams(crop_padding=1, flip=True, cutout=2, mix="cutmix")},
    "adamw": {"optimizer": "adamw", "learning_rate": 1e-3, "gradient_clip": 1.0},
    # Interrupt within batches as well as between them.
    "in parts, recomputed": {"accumulate": 2, "checkpoint_activations": True},
}


@pytest.mark.parametrize("name", list(RECIPES))
@pytest.mark.parametrize("checkpoint_seconds", [0.0, 60.0], ids=["every step", "every epoch"])
def test_a_run_cut_off_many_times_ends_as_one_that_was_not(name, checkpoint_seconds, tmp_path):
    made_here = ("teacher", "momentum", "deferred", "proco", "kcl", "tsc", "hybrid", "experts", "bbn")
    stage = name if name in made_here else "student"

    def made(run_folder=None):
        return made_training(
            stage, run_folder=run_folder, checkpoint_seconds=checkpoint_seconds, epochs=4, **RECIPES[name]
        )

    expected, expected_history = result(made())
    draw = random.Random(f"{stage} {checkpoint_seconds}")
    folder = RunFolder(tmp_path / "unfinished", "run")
    for _ in range(4):
        # With one checkpoint per epoch (5 steps), a run must pass an epoch to make progress.
        longest = 4 if checkpoint_seconds == 0 else 5
        cut_off(made(folder), draw.randint(0, longest))
    actual, history = result(made(folder))
    assert actual.keys() == expected.keys()
    assert [name for name in actual if not torch.equal(actual[name], expected[name])] == []
    assert history == expected_history


def test_an_interrupted_run_resumes(tmp_path, capsys):
    folder = RunFolder(tmp_path / "unfinished", "run")
    cut_off(made_training(run_folder=folder, checkpoint_seconds=0.0), after=7)
    made_training(run_folder=folder).run(made_images(40), made_images(9))
    assert "teacher  resumes at step 8 of 10" in capsys.readouterr().out


def test_only_the_last_two_checkpoints_remain(tmp_path):
    folder = RunFolder(tmp_path / "unfinished", "run")
    made_training(run_folder=folder, epochs=5).run(made_images(24), made_images(3))
    assert len(list(folder.folder.iterdir())) == 2


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path):
    folder = RunFolder(tmp_path / "unfinished", "run")
    for step in (1, 2):
        folder.save(step, Snapshot({"x": torch.tensor([step])}, {"epoch": step}))
    newest = max(folder.folder.iterdir())
    (newest / "tensors.safetensors").write_bytes((newest / "tensors.safetensors").read_bytes()[:20])
    assert folder.load() == Snapshot({"x": torch.tensor([1])}, {"epoch": 1})
    (newest / "state.json").unlink()
    assert folder.load().state == {"epoch": 1}


def test_checkpoints_of_another_run_are_not_loaded(tmp_path):
    RunFolder(tmp_path, "one").save(1, Snapshot({"x": torch.tensor([1])}, {}))
    assert RunFolder(tmp_path, "other").load() is None
    assert RunFolder(tmp_path, "one").load() is None  # replaced by the other run


def test_a_finished_stage_leaves_no_state_behind(tmp_path):
    folder = RunFolder(tmp_path / "unfinished", "run")
    folder.save(1, Snapshot({}, {}))
    folder.clear()
    assert not folder.folder.exists()
    folder.clear()


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (0, "no checkpoint is kept yet, so the same command starts from the first step"),
        (3, "the same command resumes after step 3 of 5 in epoch 1 of 2, kept in {folder}"),
        (5, "the same command resumes after epoch 1 of 2, kept in {folder}"),
        (7, "the same command resumes after step 2 of 5 in epoch 2 of 2, kept in {folder}"),
    ],
)
def test_ctrl_c_prints_the_checkpoint_and_how_to_resume(tmp_path, capsys, steps, message):
    from pipeline.command_line import stage_main

    folder = tmp_path / "unfinished"
    training = made_training("teacher", run_folder=RunFolder(folder, "run"), checkpoint_seconds=0.0)
    forward, done = training.objective.forward, []

    def interrupted(*arguments):
        if len(done) == steps:
            raise KeyboardInterrupt
        done.append(1)
        return forward(*arguments)

    training.objective.forward = interrupted
    params = tmp_path / "params.yaml"
    params.write_text((ROOT / "params.yaml").read_text())
    status = stage_main(lambda _: training.run(made_images(40), made_images(9, seed=1)), "", ["--params", str(params)])
    assert status == 130
    line = capsys.readouterr().err
    assert line == f"test_resume: interrupted; {message.format(folder=folder)}\n"
