"""Reasons of wrong answers: the most confident mistakes and their nearest training images, against a plain loop."""

import base64
import io
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from models.networks.backbones import Backbone
from models.networks.cosine_classifier import CosineClassifier, ImageClassifier, LinearClassifier, LinearHead
from models.prior import softmax
from pipeline.answers.reasons import NEAREST, SHOWN, confident_mistakes
from pipeline.data.dataset import Images, normalise
from pipeline.onnx_export.activation_map import maps_of_classes
from tests.support.generated_run import HOSTILE, made_report, params


class NoFiles:
    def read(self, reference):
        raise AssertionError(reference)


def images_of(vectors, labels):
    ids = [str(index) for index in range(len(labels))]
    return Images(torch.from_numpy(vectors).float(), torch.from_numpy(labels), ids, ids, NoFiles())


def features(images, rows):
    return images.images[rows]


def test_the_most_confident_mistakes_have_the_training_images_of_largest_cosine():
    random, classes = np.random.default_rng(0), ["ant", "bee", "cat"]
    labels, given = np.arange(60) % 3, np.repeat([0, 1, 2], [40, 15, 2])
    tested, stored = random.normal(size=(60, 7)), random.normal(size=(57, 7))
    p = softmax(2 * random.normal(size=(60, 3)))
    found = confident_mistakes(features, images_of(tested, labels), p, images_of(stored, given), classes, 1000)
    wrong = [row for row in np.argsort(-p.max(1)) if p[row].argmax() != labels[row]][:SHOWN]
    assert [each.row for each in found] == wrong and len(found) == SHOWN
    unit = stored / np.linalg.norm(stored, axis=1, keepdims=True)
    for each in found:
        cosines = unit @ tested[each.row] / np.linalg.norm(tested[each.row])
        assert [near.row for near in each.nearest] == np.argsort(-cosines)[:NEAREST].tolist()
        np.testing.assert_allclose([near.cosine for near in each.nearest], np.sort(cosines)[::-1][:NEAREST], atol=1e-6)
        assert [near.label for near in each.nearest] == [classes[given[near.row]] for near in each.nearest]
        assert (each.actual, each.predicted) == (classes[labels[each.row]], classes[p[each.row].argmax()])
        assert each.probability == p[each.row].max()


def test_few_rows_still_have_an_image_of_each_class_and_no_mistake_has_no_reason():
    labels = np.array([0, 1, 2])
    right, tested = np.eye(3), images_of(np.eye(3), labels)
    assert confident_mistakes(features, tested, right, tested, ["a", "b", "c"], 1) == []
    [found] = confident_mistakes(features, tested, right[[0, 1, 1]], tested, ["a", "b", "c"], 1)
    assert found.row == 2 and sorted(near.label for near in found.nearest) == ["a", "b", "c"]


def test_the_report_shows_them_with_names_as_text():
    page = made_report(12, 20)
    section = page[page.index('<section id="mistakes">') :]
    section = section[: section.index("</section>")]
    assert "Most confident mistakes" in section and "training image of" in section and "0.75" in section
    assert HOSTILE[0] not in section and "&lt;script&gt;" in section


IMAGE = params().image


def small_network(head, *last):
    """A convolution, then `last`, then the head, for 3 classes."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), *last)
    return ImageClassifier(Backbone(layers, 6), 3, 0.1 if head is CosineClassifier else 1.0, head=head).eval()


def pooled(head):
    return small_network(head, nn.AdaptiveAvgPool2d(1), nn.Flatten())


PIXELS = torch.randint(0, 256, (4, 3, 12, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("head", [CosineClassifier, LinearClassifier])
def test_a_map_is_the_evidence_at_each_position_and_its_mean_the_logit(head):
    model, chosen = pooled(head), np.array([2, 0, 1, 2])
    found = maps_of_classes(model, normalise(PIXELS, IMAGE), chosen)
    convolution, weight = model.backbone.network[0], model.classifier.weight.detach()
    with torch.no_grad():
        cells = F.conv2d(normalise(PIXELS, IMAGE), convolution.weight, convolution.bias, stride=2).clamp_min(0)
        logits = model(normalise(PIXELS, IMAGE))[1].numpy()
    assert found.shape == (4, *cells.shape[2:]) and found.dtype == np.float32
    for row, c in enumerate(chosen):
        matrix, length = weight[c], 1.0
        if head is CosineClassifier:
            matrix, length = weight[c] / weight[c].norm() / 0.1, cells[row].mean((1, 2)).norm()
        expected = sum(matrix[d] * cells[row, d] for d in range(6)) / length
        np.testing.assert_allclose(found[row], expected.numpy(), atol=1e-5)
        bias = 0.0 if head is CosineClassifier else float(model.classifier.bias[c].detach())
        assert found[row].mean() == pytest.approx(logits[row, c] - bias, abs=1e-5)


@pytest.mark.parametrize("head", [CosineClassifier, LinearClassifier])
def test_an_image_without_any_activation_has_a_map_of_zeros_and_the_others_keep_theirs(head):
    model, images = pooled(head), normalise(PIXELS, IMAGE)
    with torch.no_grad():
        model.backbone.network[0].bias.fill_(-1e-3)
    images[1], chosen = 0, np.array([2, 0, 1, 2])
    found = maps_of_classes(model, images, chosen)
    assert not found[1].any() and found[[0, 2, 3]].any(axis=(1, 2)).all() and np.isfinite(found).all()


def test_a_map_of_one_cell_is_the_logit():
    model, images = pooled(CosineClassifier), normalise(PIXELS, IMAGE)[:, :, :3, :4]
    found = maps_of_classes(model, images, np.arange(4) % 3)
    with torch.no_grad():
        logits = model(images)[1].numpy()
    assert found.shape == (4, 1, 1)
    np.testing.assert_allclose(found[:, 0, 0], logits[np.arange(4), np.arange(4) % 3], atol=1e-5)


def test_a_network_without_a_spatial_last_map_or_a_single_matrix_has_none():
    chosen = np.zeros(4, dtype=int)
    flat = small_network(CosineClassifier, nn.Flatten(), nn.LazyLinear(6))
    not_the_mean = small_network(CosineClassifier, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 6))
    gated = pooled(CosineClassifier)
    gated.classifier = LinearHead(6, 3, gated=True)
    with torch.no_grad():
        flat.backbone(torch.zeros(1, 3, 12, 10))
    for model in (flat, not_the_mean, gated):
        assert maps_of_classes(model, normalise(PIXELS, IMAGE), chosen) is None
    assert maps_of_classes(pooled(CosineClassifier), torch.zeros(4, 6), chosen) is None  # stored features


def test_each_mistake_has_the_map_of_its_wrong_class_also_without_training_images():
    labels = np.array([0, 1, 2])
    tested, asked = images_of(np.eye(3), labels), []

    def maps(rows, chosen):
        asked.append((rows.tolist(), chosen.tolist()))
        return np.stack([np.full((2, 2), 10 * row + c) for row, c in zip(rows.tolist(), chosen, strict=True)])

    p = np.array([[0.1, 0.6, 0.3], [0.0, 1.0, 0.0], [0.9, 0.1, 0.0]])
    found = confident_mistakes(features, tested, p, None, ["a", "b", "c"], 0, maps)
    assert asked == [([2, 0], [0, 1])] and [each.nearest for each in found] == [[], []]
    assert [float(each.map[0, 0]) for each in found] == [20.0, 1.0]
    without = confident_mistakes(features, tested, p, None, ["a", "b", "c"], 0, lambda _rows, _chosen: None)
    assert [each.map for each in without] == [None, None]


def test_the_report_draws_the_map_in_96_pixels_and_has_no_column_without_one():
    drawn, plain = made_report(12, 20), made_report(12, 20, heat_map=False)
    assert "activation map" not in plain
    assert 0 < len(drawn) - len(plain) < 8000  # of one map
    [uri] = re.findall(r'<img src="data:image/webp;base64,([^"]+)"[^>]*alt="activation map of', drawn)
    picture = Image.open(io.BytesIO(base64.b64decode(uri))).convert("RGB")
    assert picture.size == (96, 96)
    low, high = (np.array(picture.getpixel(place), dtype=int) for place in ((3, 3), (92, 92)))
    assert (high - low)[0] > (high - low)[1:].max()  # red where the map is large
