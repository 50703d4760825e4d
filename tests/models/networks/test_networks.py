"""Backbones, cosine classifier and projection heads: shapes, counts of parameters, and invariances."""

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from models.networks.backbones import Backbone, UnknownBackboneError, build_backbone
from models.networks.cosine_classifier import CosineClassifier, ImageClassifier
from models.networks.projection_head import ProjectionHead
from models.networks.resnet_cifar import BLOCKS_PER_STAGE, BasicBlock, CifarResNet


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("name", "count"), [("resnet20", 275_472), ("resnet32", 469_904), ("resnet56", 858_768)])
def test_cifar_resnets_have_the_published_number_of_parameters(name, count):
    network = ImageClassifier(name, classes=100, tau_s=1 / 30)
    assert parameters(network) == count
    assert parameters(network.classifier) == 64 * 100


@pytest.mark.parametrize("name", BLOCKS_PER_STAGE)
def test_a_cifar_resnet_of_depth_n_has_n_minus_one_convolutions(name):
    convolutions = [module for module in build_backbone(name).modules() if isinstance(module, torch.nn.Conv2d)]
    assert len(convolutions) == int(name.removeprefix("resnet")) - 1
    assert all(module.bias is None for module in convolutions)


def slow_shortcut(x, planes):
    """Reference shortcut: every second pixel of each axis, channels in the middle of `planes`, value by value."""
    batch, channels, height, width = x.shape
    out = torch.zeros(batch, planes, (height + 1) // 2, (width + 1) // 2)
    before = (planes - channels) // 2
    for c in range(channels):
        for i in range(0, height, 2):
            for j in range(0, width, 2):
                out[:, before + c, i // 2, j // 2] = x[:, c, i, j]
    return out


@pytest.mark.parametrize("size", [8, 7])
def test_the_shortcut_takes_every_second_pixel_and_pads_channels_on_both_sides(size):
    block = BasicBlock(16, 32, 2).eval()
    torch.nn.init.zeros_(block.conv2.weight)  # leaves only the shortcut
    x = torch.rand(2, 16, size, size)
    assert torch.equal(block(x), slow_shortcut(x, 32))


def test_a_block_that_changes_nothing_adds_its_input():
    block = BasicBlock(16, 16, 1).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(block(x), x.clamp(min=0))


def test_the_cifar_feature_is_the_pooled_output_of_a_relu():
    network = CifarResNet(3).eval()
    features = network(torch.randn(4, 3, 32, 32))
    assert features.shape == (4, 64) and (features >= 0).all()
    seen = []
    network.blocks[-1].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    again = network(torch.randn(1, 3, 32, 32))
    assert seen[0].shape == (1, 64, 8, 8)
    assert torch.allclose(again, F.adaptive_avg_pool2d(seen[0], 1).flatten(1), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "width", "size"),
    [
        ("resnet20", 64, 16),
        ("torchvision/resnet18", 512, 32),
        ("torchvision/mobilenet_v3_small", 1024, 32),
        ("timm/resnet10t", 512, 32),
    ],
)
def test_a_backbone_by_name_returns_features_of_its_width_and_trains(name, width, size):
    backbone = build_backbone(name)
    assert isinstance(backbone, Backbone) and backbone.feature_dim == width
    features = backbone(torch.randn(2, 3, size, size))
    assert features.shape == (2, width)
    features.square().sum().backward()
    first = next(backbone.parameters())
    assert first.grad is not None and first.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet33", "did you mean resnet32?"),
        ("torchvision/resnet81", "did you mean torchvision/resnet18?"),
        ("timm/resnet10tt", "did you mean timm/resnet10t?"),
        ("tim/resnet10t", "expected a CIFAR ResNet, torchvision/<model> or timm/<model>"),
        ("resnet50", "did you mean resnet"),
        ("", "backbone '' is unknown"),
        ("torchvision/", "is unknown; expected a torchvision classification model"),
        ("torchvision/fcn_resnet50", "expected a torchvision classification model"),
    ],
)
def test_an_unknown_backbone_raises_an_error_with_the_nearest_name(name, message):
    with pytest.raises(UnknownBackboneError, match=re.escape(message)) as caught:
        build_backbone(name)
    assert repr(name) in str(caught.value)


def test_class_weights_start_on_the_unit_sphere():
    classifier = CosineClassifier(16, 500)
    assert torch.allclose(classifier.weight.norm(dim=1), torch.ones(500))
    assert [name for name, _ in classifier.named_parameters()] == ["weight"]
    # Uniform in a cube before the scaling: the std of a coordinate on the sphere is about 1/sqrt(16).
    assert classifier.weight.mean().abs() < 0.02 and classifier.weight.std().item() == pytest.approx(0.25, abs=0.02)


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.integers(0, 100))
def test_cosines_do_not_change_with_the_length_of_feature_or_weight(feature_scale, weight_scale, seed):
    random = torch.Generator().manual_seed(seed)
    classifier = CosineClassifier(5, 3).double()
    features = torch.randn(4, 5, generator=random, dtype=torch.float64)
    cosines = classifier(features)
    expected = F.cosine_similarity(features[:, None], classifier.weight[None], dim=2)
    assert torch.allclose(cosines, expected, rtol=0, atol=1e-12) and (cosines.abs() <= 1 + 1e-12).all()
    with torch.no_grad():
        classifier.weight.mul_(weight_scale)
    assert torch.allclose(classifier(features * feature_scale), cosines, rtol=0, atol=1e-9)


def test_logits_are_cosines_over_tau_s_and_a_zero_feature_is_no_nan():
    model = ImageClassifier("resnet20", classes=3, tau_s=0.1).eval()
    features, logits = model(torch.randn(2, 3, 16, 16))
    assert features.shape == (2, 64) and logits.shape == (2, 3)
    assert torch.allclose(logits * 0.1, model.classifier(features), atol=1e-6)
    assert torch.isfinite(model.classifier(torch.zeros(1, 64))).all()


def test_a_projection_head_ends_on_the_unit_sphere_and_has_the_papers_size():
    head = ProjectionHead(64, 64, 32)
    assert parameters(head) == 6_368 and parameters(ProjectionHead(2048, 2048, 1024)) == 6_298_624
    projected = head(torch.randn(10, 64) * 7)
    assert projected.shape == (10, 32) and torch.allclose(projected.norm(dim=1), torch.ones(10))
