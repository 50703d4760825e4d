"""Tuning of a pretrained encoder: trained and frozen weights, low-rank updates, learning rates by layer."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

from models.networks.adapters import feature_backbone, with_encoder
from models.networks.backbones import Backbone, build_backbone
from models.networks.cosine_classifier import ImageClassifier
from models.networks.tuning import (
    LowRankUpdate,
    TunedBackbone,
    TuneError,
    Tuning,
    add_low_rank_updates,
    layers_of,
    merged_state,
)

ENCODERS = ["test_vit", "test_efficientnet", "test_convnext"]
# Names of the weights of the last block and of the layers after it.
LAST_BLOCK = {
    "test_vit": r"blocks\.5\.|norm\.",
    "test_efficientnet": r"blocks\.4\.0\.|conv_head|bn2",
    "test_convnext": r"stages\.3\.blocks\.1\.|head\.norm",
}


def tuned(name: str, tune: str, *, blocks: int = 1, rank: int = 2, rate: float = 0.1, decay: float = 1.0):
    """Build a classifier of three classes on a tuned encoder, in training mode."""
    torch.manual_seed(0)
    encoder = build_backbone(f"timm/{name}")
    head = feature_backbone(encoder.feature_dim, 4)
    return ImageClassifier(TunedBackbone(encoder, head, Tuning(tune, blocks, rank, rate, decay)), 3, 0.1).train()


def train(model: ImageClassifier, steps: int = 2) -> None:
    """Take steps of gradient descent on random images."""
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        sgd.zero_grad()
        model.train()
        nn.functional.cross_entropy(model(images)[1], torch.tensor([0, 1, 2, 0])).backward()
        sgd.step()


def changed_by_training(model: ImageClassifier) -> set[str]:
    """Return the names in the encoder's state, without batch counters, whose values are not bit-identical after training."""
    before = copy.deepcopy(merged_state(model))
    train(model)
    after = merged_state(model)
    assert before.keys() == after.keys()
    prefix = "backbone.network.0.network."
    return {
        name.removeprefix(prefix)
        for name in before
        if name.startswith(prefix) and not torch.equal(before[name], after[name])
    }


@pytest.mark.parametrize("name", ENCODERS)
def test_last_blocks_trains_the_last_block_and_leaves_weights_and_statistics_before_it_as_they_are(name):
    model = tuned(name, "last_blocks")
    names = set(model.backbone.network[0].network.state_dict())
    changed = changed_by_training(model)
    assert changed == {each for each in names if re.match(LAST_BLOCK[name], each)}


@pytest.mark.parametrize("name", ENCODERS)
def test_all_trains_every_weight_and_statistic(name):
    model = tuned(name, "all")
    # The bias of the keys has no effect: softmax ignores a constant.
    assert changed_by_training(model) == set(model.backbone.network[0].network.state_dict())


@pytest.mark.parametrize("name", ENCODERS)
def test_lora_changes_full_layers_alone_by_a_matrix_of_its_rank_and_no_bias_norm_or_statistic(name):
    model = tuned(name, "lora", rank=2)
    plain = build_backbone(f"timm/{name}").network
    layers = {f"{path}.weight": layer for path, layer in plain.named_modules()}
    convolutions = [path for path, layer in layers.items() if isinstance(layer, nn.Conv2d)]
    expected = {path for path, layer in layers.items() if isinstance(layer, nn.Linear)}
    expected |= {path for path in convolutions[1:] if layers[path].groups == 1}
    before = copy.deepcopy(merged_state(model))
    assert changed_by_training(model) == expected
    for update in model.modules():
        if isinstance(update, LowRankUpdate):  # training changes weights by little more than the rounding error
            nn.init.normal_(update.up)
    for path in expected:
        key = f"backbone.network.0.network.{path}"
        difference = (merged_state(model)[key].double() - before[key].double()).flatten(1)
        assert torch.linalg.matrix_rank(difference, rtol=1e-4) == 2


def test_lora_is_added_on_the_device_of_the_network():
    network = build_backbone("timm/test_efficientnet").to("meta")
    add_low_rank_updates(network, rank=2)
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}


@pytest.mark.parametrize("name", ENCODERS)
def test_a_merged_network_has_the_plain_names_and_the_outputs_of_the_tuned_one(name):
    model = tuned(name, "lora")
    train(model)
    encoder = build_backbone(f"timm/{name}")
    plain = ImageClassifier(with_encoder(encoder, feature_backbone(encoder.feature_dim, 4)), 3, 0.1)
    plain.load_state_dict(merged_state(model))
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(plain.eval()(images)[1], model.eval()(images)[1])
    assert model.backbone.network[0].network is not plain.backbone.network[0].network
    train(model)  # the merge is a copy, so the tuned network can continue training


def test_adaptformer_trains_its_adapters_alone_beside_the_mlp_of_every_block():
    model = tuned("test_vit", "adaptformer", rank=3)
    network = model.backbone.network[0].network
    names = {name for name in network.state_dict() if ".mlp.adapter." in name}
    assert changed_by_training(model) == names and len(names) == 6 * 4
    mlp = network.blocks[2].mlp.eval()
    x = torch.randn(2, 5, 64)
    bottleneck = torch.relu(x @ mlp.adapter.down.weight.T + mlp.adapter.down.bias)
    plain = mlp.fc2(mlp.act(mlp.fc1(x)))
    expected = plain + 0.1 * (bottleneck @ mlp.adapter.up.weight.T + mlp.adapter.up.bias)
    assert torch.allclose(mlp(x), expected, atol=1e-6) and not torch.equal(mlp(x), plain)


def test_a_tuned_network_starts_as_the_pretrained_one():
    torch.manual_seed(0)
    encoder = build_backbone("timm/test_vit")
    images = torch.randn(2, 3, 64, 64)
    expected = encoder.eval()(images)
    head = feature_backbone(encoder.feature_dim, 0)
    for tune in ("last_blocks", "lora", "adaptformer", "all"):
        backbone = TunedBackbone(copy.deepcopy(encoder), head, Tuning(tune, 1, 2, 0.1, 1.0))
        assert torch.equal(backbone.eval()(images), expected)


def test_rates_fall_by_the_decay_from_block_to_block_towards_the_stem():
    model = tuned("test_vit", "all", rate=0.5, decay=0.5)
    network, factors = model.backbone.network[0].network, model.backbone.rate_factors()
    weights = dict(network.named_parameters())
    assert {name: factors[weight] for name, weight in weights.items()} == {
        name: 0.5 * 0.5 ** (6 - layer) for name, layer in layers_of(network).items()
    }
    assert factors[weights["norm.weight"]] == 0.5 and factors[weights["blocks.4.mlp.fc1.weight"]] == 0.25
    assert factors[weights["patch_embed.proj.weight"]] == 0.5**7
    assert not set(factors) & set(model.backbone.network[1].parameters())


@pytest.mark.parametrize("tune", ["last_blocks", "lora"])
def test_rates_are_of_trained_weights_alone(tune):
    model = tuned("test_vit", tune, rate=0.3)
    trained = [p for p in model.backbone.network[0].parameters() if p.requires_grad]
    assert model.backbone.rate_factors() == dict.fromkeys(trained, 0.3)
    assert 0 < len(trained) < len(list(model.backbone.network[0].parameters()))


def test_an_average_of_the_weights_keeps_what_is_frozen_bit_for_bit():
    from models.networks.ema import WeightAverage

    model = tuned("test_efficientnet", "lora")
    average = WeightAverage(model, 0.9)
    before = copy.deepcopy(merged_state(model))
    for _ in range(3):
        train(model, 1)
        average.update(model)
    after = merged_state(average.average)
    assert after.keys() == before.keys()
    prefix = "backbone.network.0.network."
    changed = {
        name.removeprefix(prefix)
        for name in before
        if name.startswith(prefix) and not torch.equal(after[name], before[name])
    }
    assert "conv_head.weight" in changed
    assert changed <= changed_by_training(tuned("test_efficientnet", "lora"))


def test_what_cannot_be_tuned_is_refused_with_the_reason():
    head = feature_backbone(4, 0)
    plain = Backbone(nn.Sequential(nn.BatchNorm2d(3), nn.Flatten()), 4)
    with pytest.raises(TuneError, match=r"^its network has no linear layer and no convolution that LoRA could update$"):
        TunedBackbone(plain, head, Tuning("lora", 1, 2, 1.0, 1.0))
    for tuning in (Tuning("last_blocks", 1, 2, 1.0, 1.0), Tuning("all", 1, 2, 1.0, 0.5)):
        with pytest.raises(TuneError, match=r"^timm does not describe the blocks of Sequential$"):
            TunedBackbone(plain, head, tuning)
    with pytest.raises(TuneError, match=r"^its network has no transformer blocks with an MLP$"):
        tuned("test_convnext", "adaptformer")
    block = nn.Module()
    block.attn, block.mlp = nn.Identity(), nn.Conv2d(3, 3, 1)
    with pytest.raises(TuneError, match=r"^the MLP of its blocks, a Conv2d, has no linear layer$"):
        TunedBackbone(Backbone(block, 4), head, Tuning("adaptformer", 1, 2, 1.0, 1.0))
    with pytest.raises(TuneError, match=r"^its network has 6 blocks, not 7; tune `all` of it$"):
        tuned("test_vit", "last_blocks", blocks=7)
