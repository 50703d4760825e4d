"""The training engine: deterministic by seed, last partial batch dropped, errors that name the setting to change."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from pipeline.model_io import inference
from pipeline.model_io.checkpoint import ModelConfig, load_model, save_model
from pipeline.model_io.devices import choose_device, joined_ranks
from pipeline.model_io.inference import accuracy, evaluation_batch, outputs
from pipeline.params import EngineParams
from pipeline.shared.artifacts import as_csv
from pipeline.shared.errors import ParamsError, StageError
from pipeline.training.history import as_jsonl
from pipeline.training.step import precision_of
from tests.support.small_training import CPU, IMAGE, made_images, made_objective, made_training

pytestmark = pytest.mark.slow


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    weights = []
    for seed in (0, 0, 1):
        run = made_training(seed=seed)
        run.run(made_images(30), made_images(9, seed=1))
        weights.append(torch.cat([p.flatten() for p in run.objective.model.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_training_learns_classes_that_differ_plainly():
    run = made_training(epochs=6)
    history = run.run(made_images(96), made_images(30, seed=1))
    assert history[-1]["validation_accuracy"] == 1.0
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["validation_accuracy"] == accuracy(run.objective.model, made_images(30, seed=1), IMAGE, CPU)


def test_the_objective_is_told_each_epoch_before_its_first_step():
    run, calls = made_training("deferred", epochs=4), []
    begin, forward = run.objective.begin_epoch, run.objective.forward
    run.objective.begin_epoch = lambda *epoch: (calls.append(epoch), begin(*epoch))
    run.objective.forward = lambda *batch: (calls.append("step"), forward(*batch))[1]
    run.run(made_images(8), made_images(0))
    assert calls == [entry for epoch in range(4) for entry in ((epoch, 4), "step")]
    assert run.objective.loss.class_weight.min() < 1


def test_the_incomplete_last_batch_is_dropped_and_each_epoch_is_recorded():
    run = made_training()
    seen = []
    original = run.objective.forward
    run.objective.forward = lambda views, target, ids, mixed: (
        seen.append(ids.tolist()),
        original(views, target, ids, mixed),
    )[1]
    history = run.run(made_images(21), made_images(0))
    assert [len(ids) for ids in seen] == [8, 8, 8, 8]
    assert len({*seen[0], *seen[1]}) == 16
    assert [record["epoch"] for record in history] == [1, 2]
    assert "validation_accuracy" not in history[0]
    assert as_csv(history).splitlines()[0].split(",") == list(history[0])
    assert as_jsonl(history).count("\n") == 2


def test_fewer_images_than_a_batch_is_rejected_naming_the_key():
    with pytest.raises(ParamsError, match=r"teacher\.batch_size is 8, above the 5 training images"):
        made_training().run(made_images(5), made_images(3))


def test_a_loss_that_is_not_finite_stops_the_run_naming_the_term_and_the_epoch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the dump goes to artifacts/
    run = made_training(learning_rate=1e30)
    with pytest.raises(StageError, match=r"not finite in epoch 1, step \d of 8: .*classification"):
        run.run(made_images(64), made_images(3))


def test_evaluation_leaves_the_mode_as_it_was_and_does_not_depend_on_the_batch(monkeypatch):
    run = made_training()
    model, data = run.objective.model.train(), made_images(30)
    whole = outputs(model, data.images, IMAGE, CPU)
    assert model.training
    monkeypatch.setattr(inference, "EVALUATION_BATCH", 7)
    pieces = outputs(model, data.images, IMAGE, CPU)
    assert torch.allclose(whole[1], pieces[1], atol=1e-5)


def test_a_missing_device_is_rejected():
    assert choose_device("cpu") == CPU
    if torch.cuda.is_available():
        missing = f"cuda:{torch.cuda.device_count()}"
    else:
        missing = "cuda"
        assert choose_device("auto") == CPU
    with pytest.raises(ParamsError, match="GPUs are visible"):
        choose_device(missing)


def test_a_training_makes_its_gpu_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert choose_device("cuda:1") == torch.device("cuda:1") and choose_device("cuda", 1) == torch.device("cuda:1")
    assert not current
    with joined_ranks("cuda:1") as device:
        assert current == [device] == [torch.device("cuda:1")]


def test_a_finished_run_leaves_no_image_and_no_state_behind():
    run = made_training(epochs=1)
    run.run(made_images(16), made_images(0))
    left = [weakref.ref(run.step), weakref.ref(run.step.optimiser)]
    gc.disable()
    try:
        del run
        assert [reference() for reference in left] == [None, None]
    finally:
        gc.enable()


def test_a_validation_on_a_gpu_has_smaller_batches_of_larger_images():
    assert [evaluation_batch(torch.device("cuda"), size) for size in (32, 224, 448)] == [512, 128, 32]
    assert evaluation_batch(CPU, 448) == 512


def test_epoch_lines_are_plain_text_where_there_is_no_terminal(capsys):
    made_training().run(made_images(16), made_images(6))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith("teacher  epoch 1/2  loss ")
    assert not any("\x1b" in line for line in lines)
    assert all(line.endswith("images/s") for line in lines)


def test_the_averaged_weights_are_evaluated_and_saved():
    run = made_training(epochs=3, ema_decay=0.9)
    history = run.run(made_images(48), made_images(30, seed=1))
    assert run.model is not run.objective.model
    assert history[-1]["validation_accuracy"] == accuracy(run.model, made_images(30, seed=1), IMAGE, CPU)
    assert made_training().run(made_images(8), made_images(3))[0].keys() == history[0].keys()


def test_the_best_epoch_on_validation_is_saved_beside_the_last():
    run = made_training(epochs=5, learning_rate=0.2)
    history = run.run(made_images(32), made_images(30, seed=1))
    scores = [record["validation_accuracy"] for record in history]
    assert run.best.accuracy == max(scores) and run.best.epoch == scores.index(max(scores)) + 1
    model = made_training().objective.model
    model.load_state_dict(run.best.weights)
    assert accuracy(model, made_images(30, seed=1), IMAGE, CPU) == max(scores)


def test_without_a_validation_split_no_epoch_is_best():
    run = made_training()
    run.run(made_images(16), made_images(0))
    assert run.best is None


def test_an_epoch_shows_queue_fill_gradient_norm_and_memory():
    record = made_training("student").run(made_images(40), made_images(9, seed=1))[-1]
    assert record["queue_fill"] == 1.0
    assert record["gradient_norm"] > 0 and record["memory_mib"] > 10


def test_precision_auto_is_bfloat16_on_cuda_alone():
    engine = EngineParams()
    assert precision_of(engine, CPU) == torch.float32
    assert precision_of(engine, torch.device("cuda")) == torch.bfloat16
    assert precision_of(EngineParams(precision="bfloat16"), CPU) == torch.bfloat16
    assert precision_of(EngineParams(precision="float32"), torch.device("cuda")) == torch.float32


@pytest.mark.parametrize("held_out", [0, 6], ids=["without validation", "with validation"])
@pytest.mark.parametrize("rate", [1e6, 1e38], ids=["overflow in the forward pass", "weights"])
def test_a_divergence_in_the_last_step_ends_the_run_and_is_no_accuracy(held_out, rate):
    made = made_training(epochs=1, learning_rate=rate)
    with pytest.raises(StageError) as caught:
        made.run(made_images(8), made_images(held_out, seed=1))  # one step: every loss part is finite
    message = str(caught.value)
    assert message.startswith("teacher: the network has diverged by the end of epoch 1: "), message
    assert f"lower teacher.learning_rate ({rate:g})" in message and "\n" not in message


def test_a_network_that_is_not_finite_is_named_with_its_own_rate(tmp_path):
    model = made_objective("teacher").model
    config = ModelConfig("resnet20", 3, 1 / 30, 8, [0.5] * 3, [0.25] * 3)
    weights = model.state_dict()
    weights["backbone." + next(iter(model.backbone.state_dict()))].fill_(float("nan"))
    save_model(weights, config, tmp_path / "teacher")
    with pytest.raises(StageError, match=r"teacher: 1 tensor is not finite, .*lower teacher.learning_rate"):
        load_model(tmp_path / "teacher", "teacher")
