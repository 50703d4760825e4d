"""Backbones of the large data sets and of libraries (torchvision, timm): feature widths, and loading of weights."""

from __future__ import annotations

import re

import pytest
import torch

from models.networks.backbones import UnknownBackboneError, build_backbone, check_backbone
from models.networks.cosine_classifier import ImageClassifier

LARGE = {
    "torchvision/resnet50": 23_508_032,
    "torchvision/resnet152": 58_143_808,
    "torchvision/resnext50_32x4d": 22_979_904,
    "torchvision/resnext101_32x8d": 86_742_336,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(LARGE))
def test_the_papers_large_backbones_have_2048_features_and_learn(name):
    backbone = build_backbone(name)
    assert sum(p.numel() for p in backbone.parameters()) == LARGE[name]
    features = backbone(torch.randn(2, 3, 32, 32))
    assert features.shape == (2, 2048) == (2, backbone.feature_dim)
    features.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in backbone.parameters())


# A network of each family of the two libraries, and its input size in pixels.
KINDS = {
    "torchvision/alexnet": 64, "torchvision/convnext_tiny": 64, "torchvision/densenet121": 64,
    "torchvision/efficientnet_b0": 64, "torchvision/googlenet": 64, "torchvision/inception_v3": 96,
    "torchvision/maxvit_t": 224, "torchvision/mnasnet0_5": 64, "torchvision/mobilenet_v2": 64,
    "torchvision/regnet_x_400mf": 64, "torchvision/shufflenet_v2_x0_5": 64, "torchvision/swin_t": 64,
    "torchvision/vgg11": 64, "torchvision/vit_b_16": 64, "torchvision/wide_resnet50_2": 64,
    "timm/convnext_atto": 64, "timm/efficientnet_b0": 64, "timm/mixer_s32_224": 64, "timm/mobilenetv3_small_050": 64,
    "timm/mobilenetv4_conv_small": 64, "timm/nfnet_f0": 64, "timm/regnetx_002": 64, "timm/resnet50": 64, "timm/vgg11": 64,
    "timm/swin_tiny_patch4_window7_224": 224, "timm/vit_tiny_patch16_224": 64, "timm/deit_tiny_patch16_224": 64,
}  # fmt: skip


@pytest.mark.parametrize("name", list(KINDS))
def test_the_width_that_is_read_off_the_last_layer_is_that_of_the_features(name):
    size = KINDS[name]
    # Shapes only (meta device), except for RegNet, which computes its widths from tensor values.
    with torch.device("cpu" if "regnet_x" in name else "meta"):
        backbone = build_backbone(name, size).eval()
        assert backbone(torch.zeros(2, 3, size, size)).shape == (2, backbone.feature_dim)


@pytest.mark.parametrize(
    ("model", "size", "width"),
    [("resnet50_clip.openai", 224, 1024), ("vit_base_patch16_clip_quickgelu_224.openai", 384, 512)],
)
def test_the_projection_of_clip_is_kept_on_request(model, size, width):
    check_backbone(f"timm/{model}+projection")
    with torch.device("meta"):
        backbone = build_backbone(f"timm/{model}+projection", size).eval()
        assert backbone(torch.zeros(2, 3, size, size)).shape == (2, backbone.feature_dim) == (2, width)


def test_a_network_with_its_projection_loads_the_weights_of_the_whole_model():
    import timm

    whole = timm.create_model("resnet10t", num_classes=1000).eval()
    backbone = build_backbone("timm/resnet10t+projection").eval()
    backbone.load_weights(whole.state_dict())
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(backbone(image), whole(image))


def test_a_network_for_one_image_size_is_made_for_the_recipes():
    for name in ("torchvision/vit_b_16", "timm/vit_tiny_patch16_224"):
        with torch.device("meta"):
            model = ImageClassifier(name, 3, 0.1, image_size=32).eval()
            assert model(torch.empty(1, 3, 32, 32))[1].shape == (1, 3)


def test_a_colon_does_as_well_as_a_slash():
    check_backbone("timm:resnet10t")
    assert build_backbone("timm:resnet10t").feature_dim == 512
    with pytest.raises(UnknownBackboneError, match=re.escape("did you mean timm/resnet10t?")):
        check_backbone("timm:resnet10tt")


def test_a_network_without_a_feature_before_its_classifier_is_no_backbone():
    with pytest.raises(UnknownBackboneError, match="'torchvision/squeezenet1_0' is unknown"):
        check_backbone("torchvision/squeezenet1_0")


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/resnet10t"])
def test_library_weights_are_loaded_without_their_classifier(name):
    library, _, model = name.partition("/")
    if library == "timm":
        import timm

        whole = timm.create_model(model, num_classes=7)
    else:
        import torchvision

        whole = torchvision.models.get_model(model, weights=None, num_classes=7)
    backbone = build_backbone(name)
    backbone.load_weights(whole.state_dict())
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in backbone.network.state_dict().items())


def test_weights_of_a_trained_classifier_are_loaded_without_its_cosine_classifier():
    trained, backbone = ImageClassifier("resnet20", 5, 0.1), build_backbone("resnet20")
    backbone.load_weights(trained.state_dict())
    assert torch.equal(backbone.network.conv1.weight, trained.backbone.network.conv1.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("bn1.bias"), "has no bn1.bias, which this network needs"),
        (lambda state: state.update({"bn1.bias": torch.zeros(3)}), r"has bn1.bias of shape [3]; expected [16]"),
        (lambda state: state.update({"extra": torch.zeros(3)}), "has extra, which this network does not have"),
    ],
)
def test_weights_that_do_not_fit_are_rejected_by_name_and_change_nothing(change, message):
    backbone = build_backbone("resnet20")
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    state = dict(build_backbone("resnet20").network.state_dict())
    change(state)
    with pytest.raises(ValueError, match=re.escape(message)):
        backbone.load_weights(state)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
