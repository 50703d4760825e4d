"""Networks with several experts: sizes and costs of the published networks, one trunk, and the mean as one cosine."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.experts.backbone import SplitError, expert_backbone
from models.networks.cosine_classifier import ImageClassifier

CLASSES = 7


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def million_macs(network, size):
    """Count the multiplications of convolutions and linear layers for one image, in millions."""
    total = []

    def count(layer, _inputs, output):
        per_value = layer.weight[0].numel()
        total.append(per_value * output[0].numel())

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(count)
    with torch.inference_mode():
        network.train()(
            torch.zeros(1, 3, size, size)
        )  # in eval mode on the CPU, convolutions are not called as modules
    classifier = network.classifier.weight.numel() if isinstance(network, ImageClassifier) else 0
    return (sum(total) + classifier) / 1e6


def classifier(backbone, classes=CLASSES):
    torch.manual_seed(0)
    return ImageClassifier(backbone, classes, 1 / 30)


@pytest.mark.parametrize(("experts", "millions", "macs"), [(2, 0.53, 74.9), (3, 0.78, 100.3)])
def test_narrowed_experts_of_a_cifar_resnet_have_the_size_and_cost_of_ride(experts, millions, macs):
    network = classifier(expert_backbone("resnet32", experts, "early", narrow=True), 100)
    assert parameters(network) / 1e6 == pytest.approx(millions, abs=0.005)
    assert million_macs(network, 32) == pytest.approx(macs, abs=0.1)


def test_experts_of_full_width_are_parts_of_the_plain_network():
    whole, split = classifier("resnet32"), expert_backbone("resnet32", 1, "early")
    assert parameters(split) == parameters(whole.backbone)
    assert million_macs(split, 32) == pytest.approx(million_macs(whole.backbone, 32))


def test_narrowed_branches_of_a_torchvision_network_have_the_planes_of_ride():
    with torch.device("meta"):
        backbone = expert_backbone("torchvision/resnext50_32x4d", 3, "early", narrow=True)
    assert backbone.feature_dim == 3 * 384 * 4
    layer3, layer4 = backbone.network.branches[0][:2]
    assert [len(layer3), len(layer4)] == [6, 3]
    assert layer3[0].conv2.out_channels == 192 * 4 * 32 // 64
    assert layer3[0].conv1.in_channels == backbone.network.trunk[-1][-1].conv3.out_channels


def test_three_whole_networks_cost_three_times_as_much():
    backbone = expert_backbone("resnet20", 3, "nothing")
    assert parameters(backbone) == 3 * parameters(classifier("resnet20").backbone)
    assert len(backbone.network.branches) == 3


@pytest.mark.parametrize(
    ("name", "more"), [("resnet32", 3 * 2 * 64), ("torchvision/resnet18", 3 * (512 * 512 + 2 * 512))]
)
def test_branches_on_the_feature_map_add_a_batch_norm_or_a_convolution(name, more):
    backbone = expert_backbone(name, 3, "map")
    assert parameters(backbone) == parameters(classifier(name).backbone) + more
    assert backbone.feature_dim == classifier(name).feature_dim


@pytest.mark.parametrize("shared", ["nothing", "early", "map"])
@pytest.mark.parametrize("name", ["resnet20", "torchvision/resnet18"])
def test_the_trunk_runs_once(name, shared):
    backbone, calls = expert_backbone(name, 2, shared), []
    backbone.network.trunk.register_forward_hook(lambda *_: calls.append(1))
    assert backbone.eval()(torch.rand(2, 3, 32, 32)).shape == (2, backbone.feature_dim)
    assert len(calls) == 1


def test_experts_start_with_different_weights():
    features = expert_backbone("resnet20", 2, "early").eval().network(torch.rand(2, 3, 16, 16))
    assert not torch.allclose(features[:, 0], features[:, 1])


def test_the_logits_are_the_mean_of_the_cosines_of_the_experts():
    network = classifier(expert_backbone("resnet20", 3, "early", narrow=True)).eval()
    images = torch.rand(4, 3, 16, 16)
    features, logits = network(images)
    parts = network.backbone.network(images)
    weights = network.classifier.weight.unflatten(1, (3, 48))
    slow = [F.cosine_similarity(parts[:, e, None], weights[None, :, e], dim=2) for e in range(3)]
    assert torch.allclose(network.classifier.part_cosines(parts), torch.stack(slow, 1), atol=1e-6)
    assert torch.allclose(logits, sum(slow) / 3 * 30, atol=1e-5)
    assert torch.allclose(features.unflatten(1, (3, 48)).norm(dim=2), torch.ones(4, 3))


def test_the_similarity_of_two_features_is_the_mean_over_the_experts():
    backbone = expert_backbone("resnet20", 2, "early").eval()
    images = torch.rand(2, 3, 16, 16)
    first, second = backbone(images)
    parts = backbone.network(images)
    assert torch.allclose(F.cosine_similarity(first, second, 0), F.cosine_similarity(*parts, 1).mean(), atol=1e-6)


def test_a_backbone_that_cannot_be_split_is_named_with_those_that_can():
    with pytest.raises(SplitError, match=r"torchvision/mobilenet_v2 cannot be split .* expected a CIFAR ResNet"):
        expert_backbone("torchvision/mobilenet_v2", 2, "early")
    expert_backbone("torchvision/mobilenet_v2", 2, "nothing")
