"""A training step: mixed labels, bfloat16 autocast with float32 losses, averaged weights, and CUDA graph replay."""

from __future__ import annotations

import contextlib
import copy
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from models.losses.class_loss import Mixed
from pipeline.augment import apply_views
from pipeline.params import AugmentParams
from pipeline.training.cuda_graph import CapturedStep, CaptureError, cuda_graph
from pipeline.training.optimiser import ADAM_CAPTURE_RATE
from pipeline.training.step import Step
from tests.support.recorded_graph import recorded_graph
from tests.support.small_training import CPU, IMAGE, made_images, made_objective, training_params

pytestmark = pytest.mark.slow

MIXES = {
    "none": AugmentParams(crop_padding=1, flip=True, cutout=2),
    "cutmix": AugmentParams(crop_padding=1, flip=True, cutout=0, mix="cutmix"),
    "mixup": AugmentParams(crop_padding=1, flip=True, cutout=0, mix="mixup"),
}


def made_step(stage: str = "student", precision: torch.dtype = torch.float32, mix: str = "none", **changes) -> Step:
    params = training_params(augment=MIXES[mix], **changes)
    return Step(made_objective(stage), params, IMAGE, made_images(32), CPU, precision)


def drawn(step: Step, batches: int) -> list:
    generator = torch.Generator().manual_seed(5)
    return [step.draw(torch.randperm(32, generator=generator)[:8], generator) for _ in range(batches)]


@pytest.mark.parametrize("mix", ["cutmix", "mixup"])
def test_a_mixed_classifier_view_is_trained_on_both_labels_by_their_shares(mix):
    step = made_step("teacher", mix=mix)
    inputs = drawn(step, 1)[0]
    views, mixed = step.views(inputs)
    partner = inputs.chosen[inputs.mix.partner]
    assert torch.equal(mixed.target, made_images(32).labels[partner])
    objective = copy.deepcopy(step.objective)
    with torch.no_grad():
        _, logits = objective.train().model(step.normalise(views)[0])
    log_p = F.log_softmax(logits + objective.loss.log_prior, 1)
    own, other = made_images(32).labels[inputs.chosen], mixed.target
    rows = torch.arange(8)
    expected = -(mixed.share * log_p[rows, own] + (1 - mixed.share) * log_p[rows, other]).mean()
    assert step(inputs)["classification"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_contrast_views_are_never_mixed():
    step = made_step(mix="cutmix")
    inputs = drawn(step, 1)[0]
    unmixed = apply_views(made_images(32).images[inputs.chosen], inputs.draws, MIXES["cutmix"])
    views, _ = step.views(inputs)
    assert not torch.equal(views[0], unmixed[0])
    assert torch.equal(views[1:], unmixed[1:])


def test_a_share_of_one_is_the_plain_loss():
    objective = made_objective("teacher").eval()
    views = torch.randn(1, 4, 3, 8, 8)
    target = torch.tensor([0, 1, 2, 0])
    plain = objective(views, target, target)["loss"]
    mixed = objective(views, target, target, Mixed(target.flip(0), torch.ones(4)))["loss"]
    assert torch.allclose(plain, mixed)


def test_strength_0_in_the_classification_loss_is_plain_cross_entropy():
    objective = made_objective("teacher").eval()
    views, target = torch.randn(1, 4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    objective.loss.strength = 0.0
    _, logits = objective.model(views[0])
    assert torch.allclose(objective(views, target, target)["loss"], F.cross_entropy(logits, target))


@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_bfloat16_keeps_losses_weights_and_queues_in_float32_and_near_the_float32_step(stage):
    half, whole = made_step(stage, torch.bfloat16, learning_rate=1e-3), made_step(stage, learning_rate=1e-3)
    for inputs in drawn(half, 3):
        low, high = half(inputs), whole(inputs)
        assert {part.dtype for part in low.values()} == {torch.float32}
        assert low["loss"].item() == pytest.approx(high["loss"].item(), rel=0.05)
        assert low["loss"].item() != high["loss"].item()
    assert {t.dtype for t in half.state().values() if t.is_floating_point()} == {torch.float32}


ADAMW = {"optimizer": "adamw", "learning_rate": 1e-3, "gradient_clip": 1.0}


@pytest.mark.parametrize("mix", list(MIXES))
@pytest.mark.parametrize("stage", ["teacher", "student", "momentum", "adamw"])
def test_a_captured_step_does_what_the_plain_one_does(stage, mix):
    changes = {"stage": "student", **ADAMW} if stage == "adamw" else {"stage": stage}
    plain, recorded = (made_step(mix=mix, ema_decay=0.9, **changes) for _ in range(2))
    batches = drawn(plain, 4)
    before = {name: tensor.clone() for name, tensor in recorded.state().items()}
    captured = CapturedStep(recorded, batches[3], recorded_graph)
    assert all(torch.equal(before[name], tensor) for name, tensor in recorded.state().items())
    for inputs in batches[:3]:
        expected, actual = plain(inputs), captured(inputs)
        assert {name: value.item() for name, value in expected.items()} == {k: v.item() for k, v in actual.items()}
    for name, tensor in plain.state().items():
        assert torch.equal(tensor, recorded.state()[name]), name


def test_a_wrong_replay_is_rejected_and_leaves_the_run_unchanged():
    step = made_step()
    before = {name: tensor.clone() for name, tensor in step.state().items()}

    def forgetful(work):
        return lambda: None, work()

    with pytest.raises(CaptureError, match="its replay gives another objective"):
        CapturedStep(step, drawn(step, 1)[0], forgetful)
    assert all(torch.equal(before[name], tensor) for name, tensor in step.state().items())


def test_an_operation_that_cannot_be_captured_is_named_and_leaves_the_run_as_it_was():
    step = made_step()
    before = {name: tensor.clone() for name, tensor in step.state().items()}

    def refusing(work):
        work()
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    with pytest.raises(CaptureError, match="operation not permitted when stream is capturing"):
        CapturedStep(step, drawn(step, 1)[0], refusing)
    assert all(torch.equal(before[name], tensor) for name, tensor in step.state().items())


def test_a_failed_recording_leaves_the_stream_of_before(monkeypatch):
    chosen = []

    class Failing(contextlib.nullcontext):
        def __exit__(self, *_):
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "Stream", mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: mock.MagicMock(name="steps"))
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", Failing)
    monkeypatch.setattr(torch.cuda, "set_stream", chosen.append)
    with pytest.raises(RuntimeError, match="previous error"):
        cuda_graph(dict)
    assert len(chosen) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("stage", ["teacher", "student", "momentum", "adamw"])
@pytest.mark.parametrize(("accumulate", "recompute"), [(1, False), (4, False), (2, True)])
def test_a_cuda_graph_does_what_the_plain_step_does(stage, accumulate, recompute):
    device = torch.device("cuda")
    steps = []
    for _ in range(2):
        objective = made_objective("student" if stage == "adamw" else stage)
        objective.to(device, memory_format=torch.channels_last)
        # The learning rate that the engine uses for the capture.
        changes = {**ADAMW, "learning_rate": ADAM_CAPTURE_RATE} if stage == "adamw" else {}
        params = training_params(ema_decay=0.9, accumulate=accumulate, **changes)
        steps.append(Step(objective, params, IMAGE, made_images(32), device, torch.bfloat16, recompute))
    batches = drawn(steps[0], 4)
    captured = CapturedStep(steps[1], batches[3])
    for inputs in batches[:3]:
        expected, actual = steps[0](inputs.to(device)), captured(inputs)
        assert actual["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-2)
