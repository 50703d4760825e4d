"""Gradient accumulation equals the whole batch; activation checkpointing is bit-identical and takes less memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from models.networks.activation_checkpointing import NoBlocksError, blocks, recompute_blocks
from models.networks.backbones import build_backbone
from pipeline.params import AugmentParams, EngineParams
from pipeline.shared.errors import ParamsError
from pipeline.training.cuda_graph import CapturedStep, CaptureError
from pipeline.training.step import Step
from tests.support.recorded_graph import recorded_graph
from tests.support.small_training import (
    CPU,
    IMAGE,
    double_step,
    made_images,
    made_objective,
    made_training,
    training_params,
)

pytestmark = pytest.mark.slow

MIXED = AugmentParams(crop_padding=1, flip=True, cutout=0, mix="cutmix")


# The losses of experts need one label per image: no mixed images.
@pytest.mark.parametrize(
    ("stage", "augment"),
    [(stage, training_params().augment) for stage in ("teacher", "student", "momentum", "experts", "bbn")]
    + [(stage, MIXED) for stage in ("teacher", "student", "momentum")],
)
def test_parts_of_a_batch_give_the_losses_gradient_and_queues_of_the_whole(stage, augment):
    whole, parts = double_step(stage, 1, augment), double_step(stage, 4, augment)
    generator = torch.Generator().manual_seed(5)
    for _ in range(2):
        # Class 2 has only image 5, so that all its keys are of one image.
        chosen = torch.tensor([5, 0, 1, 3, 4, 6, 5, 7])[torch.randperm(8, generator=generator)]
        inputs = whole.draw(chosen, generator)
        expected, actual = whole(inputs), parts(inputs)
        assert expected.keys() == actual.keys()
        for name, value in expected.items():
            assert actual[name].item() == pytest.approx(value.item(), rel=1e-9, abs=1e-12), name
        if stage in ("student", "momentum"):
            assert expected["queries_without_keys"] == 2
    for (name, value), other in zip(whole.state().items(), parts.state().values(), strict=True):
        # The mean length of a feature is a running statistic, which each part updates.
        assert name.endswith("classifier.length") or torch.allclose(value, other, rtol=0, atol=1e-10), name
    for one, other in zip(whole.optimiser.parameters, parts.optimiser.parameters, strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-8, atol=1e-12)


def test_a_batch_in_parts_is_captured_like_any_other():
    plain, recorded = (
        Step(made_objective("student"), training_params(accumulate=2, ema_decay=0.9), IMAGE, made_images(32), CPU)
        for _ in range(2)
    )
    generator = torch.Generator().manual_seed(5)
    batches = [plain.draw(torch.randperm(32, generator=generator)[:8], generator) for _ in range(3)]

    captured = CapturedStep(recorded, batches[2], recorded_graph)
    for inputs in batches[:2]:
        assert {k: v.item() for k, v in plain(inputs).items()} == {k: v.item() for k, v in captured(inputs).items()}
    assert all(torch.equal(value, recorded.state()[name]) for name, value in plain.state().items())


def test_the_optimiser_takes_one_step_a_batch_however_many_parts():
    run = made_training(accumulate=4)
    steps = []
    original = run.objective.after_step
    run.objective.after_step = lambda: (steps.append(1), original())[1]
    history = run.run(made_images(24), made_images(0))
    assert len(steps) == 2 * 3 and history[-1]["epoch"] == 2


@pytest.mark.parametrize("parts", [3, 8, 16])
def test_an_invalid_number_of_micro_batches_is_rejected(parts):
    with pytest.raises(ParamsError, match=rf"teacher\.accumulate is {parts}, into which a process's 8 images"):
        made_training(accumulate=parts).run(made_images(24), made_images(0))


def saved_bytes(step: Step, inputs) -> int:
    """Return the bytes that autograd saves for the backward pass of one step, counting each storage once."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        views, mixed = step.views(inputs)
        step.objective.train()
        step.objective(step.normalise(views), step.labels[inputs.chosen], inputs.chosen, mixed)
    return sum(kept.values())


@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_activation_checkpointing_is_bit_identical_and_uses_less_memory(stage):
    plain, recomputed = (
        Step(made_objective(stage), training_params(ema_decay=0.9), IMAGE, made_images(32), CPU, torch.float32, flag)
        for flag in (False, True)
    )
    made_state = {name: value.clone() for name, value in plain.state().items()}
    generator = torch.Generator().manual_seed(5)
    inputs = [plain.draw(torch.randperm(32, generator=generator)[:8], generator) for _ in range(3)]
    assert saved_bytes(recomputed, inputs[0]) < 0.55 * saved_bytes(plain, inputs[0])
    for step in (plain, recomputed):  # the counted passes changed running statistics and queues
        step.load_state(made_state)
    for drawn in inputs:
        expected, actual = plain(drawn), recomputed(drawn)
        assert {k: v.item() for k, v in expected.items()} == {k: v.item() for k, v in actual.items()}
    # Gradients, momentum, and running statistics with their counters, which recomputation must not update twice.
    assert [name for name, value in plain.state().items() if not torch.equal(value, recomputed.state()[name])] == []


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/vit_tiny_patch16_224", "timm/convnext_atto"])
def test_networks_of_libraries_are_recomputed_block_by_block(name):
    torch.manual_seed(0)
    plain = build_backbone(name, 32).train()
    recomputed = copy.deepcopy(plain)
    assert recompute_blocks(recomputed) >= 8
    # Their dropout drops nothing. A captured step cannot read the state of the random numbers.
    assert not any(block.forward.random for block in blocks(recomputed))
    images = torch.randn(2, 3, 32, 32)
    for network in (plain, recomputed):
        torch.manual_seed(1)
        network(images).square().sum().backward()
    for one, other in zip(plain.parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    assert plain.state_dict().keys() == recomputed.state_dict().keys()


def test_dropout_is_drawn_alike_when_a_block_is_run_again():
    block = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)), nn.Linear(8, 8))
    network = nn.Sequential(nn.ModuleDict({"inner": block}))
    network[0].forward = lambda x: block(x)
    other = copy.deepcopy(network)
    other[0].forward = lambda x: other[0]["inner"](x)
    assert recompute_blocks(other) == 1
    x = torch.randn(4, 8)
    for one in (network, other):
        torch.manual_seed(3)
        one(x).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(network.parameters(), other.parameters(), strict=True))


def test_a_copy_of_a_checkpointed_network_uses_its_own_weights():
    network = build_backbone("resnet20")
    recompute_blocks(network)
    other = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert network.train()(torch.randn(2, 3, 8, 8)).abs().sum() > 0


def test_a_block_is_the_smallest_element_of_a_sequence_of_its_type():
    kinds = {
        "resnet20": {"BasicBlock"}, "torchvision/resnet18": {"BasicBlock"}, "torchvision/swin_t": {"SwinTransformerBlock"},
        "torchvision/efficientnet_b0": {"MBConv"}, "torchvision/densenet121": {"_DenseBlock"},
        "timm/convnext_atto": {"ConvNeXtBlock"},
    }  # fmt: skip
    for name, expected in kinds.items():
        with torch.device("meta"):
            actual = {type(block).__name__ for block in blocks(build_backbone(name))}
        assert expected <= actual, (name, actual)


def test_a_network_without_a_sequence_of_blocks_is_rejected_with_the_params_key():
    with torch.device("meta"):
        network = build_backbone("torchvision/vgg11")
    with pytest.raises(NoBlocksError):
        recompute_blocks(network)
    run = made_training()
    run.engine = EngineParams(checkpoint_activations=True)
    run.objective.model.backbone.network.blocks = nn.Sequential(nn.Conv2d(16, 64, 1))
    with pytest.raises(
        ParamsError, match=r"engine\.checkpoint_activations is true, but teacher\.backbone: its network"
    ):
        run.run(made_images(24), made_images(0))


def test_a_capture_that_fails_with_activation_checkpointing_reports_the_reason():
    step = Step(made_objective("teacher"), training_params(), IMAGE, made_images(32), CPU, torch.float32, True)

    def refusing(work):
        work()
        raise RuntimeError("Cannot call CUDAGeneratorImpl::current_seed during CUDA graph capture")

    with pytest.raises(CaptureError, match="current_seed during CUDA graph capture"):
        CapturedStep(step, step.draw(torch.arange(8), torch.Generator()), refusing)
