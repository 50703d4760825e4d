"""Dilated backbones and FCN heads: parameter counts, equality with timm and torchvision, shapes, weights of a file."""

import pytest
import torch

from models.networks.backbones import UnknownBackboneError, build_backbone
from models.segmentation.dilated import dilated_backbone
from models.segmentation.network import SegmentationModel


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_paper_network_has_the_parameters_of_mmsegmentation():
    with torch.device("meta"):
        model = SegmentationModel("timm/resnet50c", 150)
    heads = model.decode_head, model.auxiliary_head
    assert count(model.backbone) == 23_527_264
    assert [head.classifier.weight.numel() for head in heads] == [76_800, 38_400]
    assert [count(head) - head.classifier.weight.numel() for head in heads] == [23_596_032, 2_359_808]
    assert count(model) == 49_598_304
    assert count(model) - count(model.auxiliary_head) == 47_200_096
    with torch.device("meta"):
        assert count(SegmentationModel("timm/resnet50c", 150, classifier="linear")) == 49_598_604


def randomised(module):
    # Batch norm with other statistics than 0 and 1, so that a layer in the wrong place is noticed.
    generator = torch.Generator().manual_seed(0)
    for name, value in module.state_dict().items():
        if value.is_floating_point() and value.dim() == 1:
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5 if "mean" not in name else value)
    return module.eval()


@pytest.mark.parametrize("name", ["resnet18", "resnet50c"])
def test_dilated_stages_equal_timm_at_output_stride_8(name):
    timm = pytest.importorskip("timm")
    reference = randomised(timm.create_model(name, features_only=True, output_stride=8, out_indices=(3, 4)))
    own = dilated_backbone(f"timm/{name}").eval()
    own.network.load_state_dict(reference.state_dict(), strict=False)
    images = torch.randn(1, 3, 50, 66)
    with torch.no_grad():
        for got, expected in zip(own.maps(images), reference(images), strict=True):
            torch.testing.assert_close(got, expected)


def test_dilated_stages_equal_torchvision():
    from torchvision.models import resnet50
    from torchvision.models._utils import IntermediateLayerGetter

    reference = randomised(resnet50(weights=None, replace_stride_with_dilation=[False, True, True]))
    own = dilated_backbone("torchvision/resnet50").eval()
    own.load_weights(reference.state_dict())
    images = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        expected = IntermediateLayerGetter(reference, {"layer3": "0", "layer4": "1"})(images)
        for got, value in zip(own.maps(images), expected.values(), strict=True):
            torch.testing.assert_close(got, value)


@pytest.mark.parametrize(
    ("name", "stride", "widths"), [("resnet20", 4, (32, 64)), ("torchvision/resnet18", 8, (256, 512))]
)
def test_small_networks_keep_the_resolution_of_their_stride(name, stride, widths):
    model = SegmentationModel(name, 11)
    assert (model.stride, model.backbone.widths) == (stride, widths)
    outputs = model(torch.randn(2, 3, 45, 64))
    cells = -(-45 // stride), 64 // stride
    assert outputs.logits.shape == outputs.auxiliary.shape == (2, 11, *cells)
    assert outputs.features.shape == (2, model.feature_dim, *cells)
    assert outputs.logits.abs().max() <= 1 / 0.05 + 1e-4
    assert model.eval()(torch.randn(1, 3, 45, 64)).auxiliary is None


def test_every_cell_is_classified_by_its_cosine():
    model = SegmentationModel("resnet20", 5).eval()
    outputs = model(torch.randn(2, 3, 24, 32))
    feature = outputs.features[1, :, 4, 6]
    expected = torch.cosine_similarity(feature[None], model.decode_head.classifier.weight) / 0.05
    torch.testing.assert_close(outputs.logits[1, :, 4, 6], expected)


def test_the_weights_of_a_classifier_of_the_same_network_can_be_loaded():
    source = build_backbone("resnet20")
    model = SegmentationModel("resnet20", 5)
    model.backbone.load_weights({f"backbone.network.{name}": v for name, v in source.network.state_dict().items()})
    assert torch.equal(model.backbone.network.conv1.weight, source.network.conv1.weight)


def test_the_deep_stem_of_mmsegmentation_can_be_loaded():
    own = dilated_backbone("timm/resnet50c")
    names = {"conv1.0.": "stem.0.", "conv1.1.": "stem.1.", "conv1.3.": "stem.3.", "conv1.4.": "stem.4."}
    names |= {"conv1.6.": "stem.6.", "bn1.": "stem.7."}
    state = {key: torch.randn_like(v) if v.is_floating_point() else v for key, v in own.network.state_dict().items()}
    renamed = {
        next((new + key.removeprefix(old) for old, new in names.items() if key.startswith(old)), key): value
        for key, value in state.items()
    }
    assert sum(name.startswith("stem.") for name in renamed) == 18
    own.load_weights(renamed)
    assert torch.equal(own.network.state_dict()["bn1.weight"], state["bn1.weight"])


@pytest.mark.parametrize("name", ["torchvision/vgg11", "timm/resnet50d", "torchvision/mobilenet_v3_small"])
def test_a_network_that_cannot_be_dilated_is_refused(name):
    with torch.device("meta"), pytest.raises(UnknownBackboneError, match="cannot be dilated; expected a ResNet"):
        dilated_backbone(name)
