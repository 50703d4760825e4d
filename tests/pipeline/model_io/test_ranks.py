"""Distributed training: two ranks that share a batch compute the same as one process with the whole batch."""

from __future__ import annotations

import os
from pathlib import Path
from unittest.mock import patch

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d

from models.distributed import SharedBatchNorm, gather_batch, mean_over_ranks, rank, synchronise_batch_norm
from models.networks.adapters import feature_backbone
from models.networks.backbones import build_backbone
from models.networks.cosine_classifier import ImageClassifier
from models.networks.tuning import TunedBackbone, Tuning
from pipeline.model_io.devices import joined_ranks
from pipeline.model_io.inference import accuracy
from pipeline.params import AugmentParams
from pipeline.shared.errors import ParamsError, StageError
from pipeline.training import engine
from pipeline.training.resume import RunFolder
from pipeline.training.step import Step
from tests.support.small_training import CPU, IMAGE, double_step, in_ranks, made_images, made_training, training_params

# Partners of a mix come from either rank.
MIXED = AugmentParams(crop_padding=1, flip=True, cutout=0, mix="cutmix")
pytestmark = pytest.mark.end_to_end


def ten_steps(stage: str) -> dict:
    """Return the losses of ten steps, and the state after them.

    In double precision: in single precision, ten steps amplify the rounding of a sum in another order, on some CPUs
    beyond any bound that could still detect a fault.
    """
    changes = {
        "mixed": {"ema_decay": 0.9, "augment": MIXED},
        "adamw": {"optimizer": "adamw", "learning_rate": 1e-3, "gradient_clip": 1.0},
    }.get(stage, {})
    training = made_training("student" if changes else stage, epochs=2, **changes)
    training.objective.double()
    for name in ("model", "teacher", "momentum_encoder"):
        network = getattr(training.objective, name, None)
        if network is not None:
            network.register_forward_pre_hook(lambda _, arguments: (arguments[0].double(), *arguments[1:]))
    losses = []

    class KeptStep(Step):
        def __call__(self, inputs):
            parts = super().__call__(inputs)
            losses.append({name: mean_over_ranks(value).item() for name, value in parts.items()})
            return parts

    with patch.object(engine, "Step", KeptStep):
        training.run(made_images(40), made_images(9, seed=1))
    queues = training.objective.queues.state_dict() if stage != "teacher" else {}
    return {"losses": losses, "queues": queues, "state": dict(training.model.state_dict())}


@pytest.mark.parametrize("stage", ["teacher", "student", "momentum", "mixed", "adamw"])
def test_ten_steps_on_two_ranks_give_the_losses_and_queues_of_one(stage, tmp_path):
    alone = ten_steps(stage)
    first, second = in_ranks(ten_steps, tmp_path, stage)
    assert len(first["losses"]) == 10
    for one, other in zip(first["losses"], alone["losses"], strict=True):
        assert one == pytest.approx(other, rel=1e-8, abs=1e-9)
    for name, value in alone["queues"].items():
        exact = value.dtype == torch.int64
        assert torch.equal(first["queues"][name], second["queues"][name])
        actual = first["queues"][name]
        assert torch.equal(actual, value) if exact else torch.allclose(actual, value, rtol=0, atol=1e-10)
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]) or "num_batches" in name


def one_step(parts: int) -> dict:
    """Return losses and gradients of a batch of eight in `parts`, on a network without batch norm.

    Image 5 is the only one of class 2 in queues and batch, so L_tau omits both its queries: the first rank keeps two
    of its four queries, the second all of them.
    """
    step = double_step("student", parts, training_params().augment)
    chosen = torch.tensor([5, 5, 0, 1, 3, 4, 6, 7])
    losses = step(step.draw(chosen, torch.Generator().manual_seed(5)))
    return {
        "losses": {name: mean_over_ranks(value) for name, value in losses.items()},
        "gradients": [parameter.grad for parameter in step.optimiser.parameters],
    }


@pytest.mark.parametrize("parts", [1, 2])
def test_a_batch_shared_unevenly_by_queries_without_keys_has_the_losses_and_gradient_of_one_rank(parts, tmp_path):
    alone = one_step(1)
    assert alone["losses"]["queries_without_keys"] == 2
    for actual in in_ranks(one_step, tmp_path, parts):
        for name, value in alone["losses"].items():
            assert actual["losses"][name].item() == pytest.approx(value.item(), rel=1e-9, abs=1e-12), name
        for one, other in zip(alone["gradients"], actual["gradients"], strict=True):
            assert torch.allclose(one, other, rtol=1e-8, atol=1e-12)


def shared_norm() -> list[torch.Tensor]:
    """Run batch norm on this rank's half of a batch; return output, input and weight gradients, running statistics."""
    generator = torch.Generator().manual_seed(3)
    batch = torch.randn(8, 5, 4, 4, generator=generator, dtype=torch.float64) * 3 + 2
    weights = torch.randn(8, 5, 4, 4, generator=generator, dtype=torch.float64)
    half = slice(dist.get_rank() * 4, dist.get_rank() * 4 + 4)
    layer = SharedBatchNorm.of(torch.nn.BatchNorm2d(5).double())
    x = batch[half].clone().requires_grad_()
    out = layer(x)
    (out * weights[half]).sum().backward()
    return [gather_batch(out.detach()), gather_batch(x.grad), layer.weight.grad, layer.running_mean, layer.running_var]


def test_the_shared_batch_norm_is_the_batch_norm_of_the_whole_batch(tmp_path):
    generator = torch.Generator().manual_seed(3)
    batch = (torch.randn(8, 5, 4, 4, generator=generator, dtype=torch.float64) * 3 + 2).requires_grad_()
    weights = torch.randn(8, 5, 4, 4, generator=generator, dtype=torch.float64)
    layer = torch.nn.BatchNorm2d(5).double()
    out = layer(batch)
    (out * weights).sum().backward()
    first, second = in_ranks(shared_norm, tmp_path)
    for actual, expected in zip(first[:2], (out, batch.grad), strict=True):
        assert torch.allclose(actual, expected, rtol=0, atol=1e-12)
    assert torch.allclose(first[2] + second[2], layer.weight.grad, rtol=0, atol=1e-12)
    for actual, expected in zip(first[3:], (layer.running_mean, layer.running_var), strict=True):
        assert torch.allclose(actual, expected, rtol=0, atol=1e-12)


def converted_act_norm() -> torch.Tensor:
    """Convert timm's batch norm with activation, and run it on this rank's half of a batch."""
    batch = torch.randn(8, 5, 4, 4, generator=torch.Generator().manual_seed(3))
    network = synchronise_batch_norm(torch.nn.Sequential(BatchNormAct2d(5)), CPU)
    return gather_batch(network(batch[dist.get_rank() * 4 :][:4]).detach())


def test_a_batch_norm_of_timm_keeps_its_activation_on_two_ranks(tmp_path):
    batch = torch.randn(8, 5, 4, 4, generator=torch.Generator().manual_seed(3))
    expected = torch.relu(torch.nn.BatchNorm2d(5)(batch))
    for actual in in_ranks(converted_act_norm, tmp_path):
        assert torch.allclose(actual, expected, atol=1e-5)


def tuned_run() -> dict[str, torch.Tensor]:
    """Train the last block of an encoder for an epoch; return the states before and after."""
    training = made_training("teacher", epochs=1, optimizer="adamw", learning_rate=1e-3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = build_backbone("timm/test_efficientnet")
        head = feature_backbone(encoder.feature_dim, 4)
        backbone = TunedBackbone(encoder, head, Tuning("last_blocks", 1, 2, 0.1, 1.0))
        training.objective.model = ImageClassifier(backbone, 3, 1 / 30)
    before = {name: value.clone() for name, value in training.objective.model.state_dict().items()}
    training.run(made_images(40), made_images(9, seed=1))
    return {**{f"before.{name}": value for name, value in before.items()}, **training.model.state_dict()}


def test_a_tuned_encoder_is_trained_alike_on_two_ranks_and_its_frozen_part_stays_as_it_is(tmp_path):
    alone = tuned_run()
    first, second = in_ranks(tuned_run, tmp_path)
    changed = 0
    for name in (name for name in first if not name.startswith("before.")):
        assert torch.equal(first[name], second[name]), name
        if ".0.network." in name and "blocks.4.0." not in name and "conv_head" not in name and "bn2" not in name:
            assert torch.equal(first[name], first[f"before.{name}"]), name
        else:
            assert torch.allclose(first[name].float(), alone[name].float(), rtol=1e-2, atol=1e-3), name
            changed += not torch.equal(first[name], first[f"before.{name}"])
    assert changed > 10


def ragged_accuracy() -> float:
    return accuracy(made_training().objective.model, made_images(11, seed=2), IMAGE, CPU)


def test_every_image_is_evaluated_once_also_when_they_do_not_divide_evenly(tmp_path):
    assert in_ranks(ragged_accuracy, tmp_path) == [ragged_accuracy()] * 2


def uneven_batch() -> str:
    try:
        made_training(batch_size=7).run(made_images(21), made_images(0))
    except ParamsError as error:
        return str(error)
    return ""


def failed_mixed_run(folder: Path) -> str:
    with patch.object(engine, "FAILURES", folder), pytest.raises(StageError) as caught:
        made_training(learning_rate=1e30, augment=MIXED).run(made_images(40), made_images(0))
    return str(caught.value)


def test_a_mixed_run_that_fails_on_two_ranks_writes_its_dump_without_a_deadlock(tmp_path):
    one, two = in_ranks(failed_mixed_run, tmp_path, tmp_path / "failures")
    assert one == two and "not finite in epoch 1" in one
    views = safetensors.torch.load_file(tmp_path / "failures/teacher/tensors.safetensors")["views"]
    assert views.shape == (1, 4, 3, 8, 8)


def steps_with_checkpoints(folder: Path) -> list[int]:
    # The first rank would write one after every step, the second none.
    run, saved = made_training(run_folder=RunFolder(folder, ""), checkpoint_seconds=1e9 * rank(), epochs=1), []
    with patch.object(run, "_save", lambda *_: saved.append(run._at.step)):
        run.run(made_images(144), made_images(0))
    return saved


def test_ranks_with_different_clocks_write_the_same_checkpoints(tmp_path):
    assert in_ranks(steps_with_checkpoints, tmp_path, tmp_path / "run") == [[1, 17, 0]] * 2


def test_a_batch_that_ranks_cannot_share_is_rejected(tmp_path):
    message = in_ranks(uneven_batch, tmp_path)
    assert message == ["teacher.batch_size is 7, which 2 processes cannot share; expected a multiple"] * 2


def test_a_single_process_joins_nothing():
    assert "WORLD_SIZE" not in os.environ
    with joined_ranks("cpu") as device:
        assert device == CPU and not dist.is_initialized()
    share = torch.arange(3)
    assert gather_batch(share) is share and mean_over_ranks(share) is share
