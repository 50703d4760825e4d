"""Golden numbers P1 and P2 in float64, and the averages and limits of the pixel losses."""

import pytest
import torch
import torch.nn.functional as F

from models.contrast.gml import ClassSegments, contrast_losses
from models.networks.cosine_classifier import CosineClassifier
from models.segmentation.losses import pixel_cross_entropy
from models.segmentation.network import upsample

EXACT = {"rel": 0, "abs": 1e-10}
LOG_PRIOR = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64).log()


def p1(strength, average, pixels=slice(None)):
    classifier = CosineClassifier(2, 3).double()
    with torch.no_grad():
        classifier.weight.copy_(torch.tensor([[1.0, 0], [0, 2], [-3, 4]]))
    features = torch.tensor([[3.0, 4], [1, 0], [0, 2], [1, 1]], dtype=torch.float64)
    logits = (classifier(features) / 0.05).T.view(1, 3, 1, 4)[..., pixels]
    labels = torch.tensor([0, 2, 255, 1], dtype=torch.uint8).view(1, 1, 4)[..., pixels]
    return pixel_cross_entropy(logits, labels, LOG_PRIOR, strength, average=average).item()


def test_p1_the_rows_without_adjustment():
    rows = 4.01817981258924, 32.000000002061164, 0.69315328277499
    for pixel, expected in zip((0, 1, 3), rows, strict=True):
        assert p1(0.0, "valid", slice(pixel, pixel + 1)) == pytest.approx(expected, **EXACT)


@pytest.mark.parametrize(
    ("strength", "valid", "official"),
    [
        (0.0, 12.237111032475132, 9.177833274356349),
        (0.2, 12.32938941639154, 9.247042062293655),
        (1.0, 12.753124685238072, 9.564843513928555),
    ],
)
def test_p1_the_mean_over_valid_pixels_and_over_all_pixels(strength, valid, official):
    assert p1(strength, "valid") == pytest.approx(valid, **EXACT)
    assert p1(strength, "official") == pytest.approx(official, **EXACT)


@pytest.mark.parametrize(
    ("strength", "mean"), [(0.0, 9.648448139017582), (0.2, 9.762376319614708), (1.0, 10.285791245773277)]
)
def test_p2_equation_10_on_cells(strength, mean):
    queries = F.normalize(torch.tensor([[3.0, 4], [1, 0], [1, 1]], dtype=torch.float64), dim=1)
    keys = F.normalize(torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [-0.8, 0.6]], dtype=torch.float64), dim=1)
    lengths = torch.tensor([2, 1, 1])
    segments = ClassSegments(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 2, 3]), lengths, 2)
    ids = torch.arange(3), torch.arange(4) + 10
    target = torch.tensor([0, 2, 1])

    def loss(rows):
        similarity = queries[rows] @ keys.T
        return contrast_losses(
            similarity, segments, target[rows], LOG_PRIOR, 0.07, strength, query_ids=ids[0][rows], key_ids=ids[1]
        ).gml.item()

    assert loss(slice(3)) == pytest.approx(mean, **EXACT)
    if strength == 1:
        each = [1.189686578897964, 27.617462440398477, 2.050224718023394]
        assert [loss(slice(i, i + 1)) for i in range(3)] == pytest.approx(each, **EXACT)


def test_p3_bilinear_upsampling_without_aligned_corners():
    row = torch.tensor([0.0, 1.0], dtype=torch.float64).view(1, 1, 1, 2)
    assert upsample(row, 1, 4).flatten().tolist() == pytest.approx([0, 0.25, 0.75, 1], **EXACT)


def test_a_prior_added_to_the_cells_equals_a_prior_added_to_the_pixels():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randint(3, (2, 13, 11))
    pixels = F.interpolate(logits, size=(13, 11), mode="bilinear")
    expected = F.cross_entropy(pixels + 0.6 * LOG_PRIOR[:, None, None], labels)
    assert pixel_cross_entropy(logits, labels, LOG_PRIOR, 0.6).item() == pytest.approx(expected.item(), **EXACT)


def test_a_batch_without_labelled_pixels_has_loss_0_and_gradient_0():
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = pixel_cross_entropy(logits, torch.full((1, 4, 4), 255), LOG_PRIOR)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().sum() == 0
