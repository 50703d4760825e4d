"""The feature index and the class-activation map of an export, against the graph's own outputs in numpy."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from models.networks.backbones import NoFeatureMapError, build_backbone
from models.networks.cosine_classifier import ImageClassifier, LinearClassifier, LinearHead, linear_head
from pipeline.data.dataset import Images
from pipeline.onnx_export import explanations
from pipeline.onnx_export.activation_map import class_rows
from pipeline.onnx_export.explanations import check_map, write_explanations
from pipeline.onnx_export.graph import ServedStudent, to_onnx
from pipeline.onnx_export.release import open_session
from pipeline.params import ExplainParams
from pipeline.shared.errors import StageError
from serving.repository.manifest import STUDENT_NAME, sha256_of

SIZE, CLASSES, D = 16, 4, 64


class Files:
    """A source whose images are JPEG files with a comment."""

    def read(self, reference: str) -> bytes:
        stream = io.BytesIO()
        Image.new("RGB", (64, 32), (int(reference), 0, 0)).save(stream, "JPEG", comment=b"private")
        return stream.getvalue()


def train_images(count: int = 12) -> Images:
    pixels = torch.randint(
        0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    names = [f"ä/{number}" for number in range(count)]
    return Images(pixels, torch.arange(count) % CLASSES, names, [str(number) for number in range(count)], Files())


def network(head: object = None) -> ImageClassifier:
    torch.manual_seed(0)
    model = ImageClassifier("resnet20", CLASSES, 1 / 30)
    if head is not None:
        model.classifier, model.tau_s = head, 1.0
    return model.eval()


def exported(folder: Path, model: ImageClassifier) -> object:
    served = ServedStudent(model, [0.5] * 3, [0.25] * 3, [0.0] * CLASSES, with_map=True).eval()
    (folder / STUDENT_NAME).write_bytes(to_onnx(served, SIZE, 20))
    return open_session(folder / STUDENT_NAME)


@pytest.mark.slow
@pytest.mark.parametrize(
    "head", [None, LinearClassifier(D, CLASSES), linear_head(torch.randn(CLASSES, D), torch.zeros(CLASSES))]
)
def test_the_mean_of_a_map_is_the_logit_and_the_rows_are_features_of_the_graph(tmp_path, head):
    if isinstance(head, LinearClassifier):
        nn.init.zeros_(head.bias)
    model, train = network(head), train_images()
    session = exported(tmp_path, model)
    explain = write_explanations(tmp_path, session, model, train, ExplainParams(images=9, thumbnails=16, map=True))
    inputs = {"image": train.images.numpy(), "strength": np.zeros((12, 1), np.float32)}
    logits, feature, cells = session.run(["logits", "feature", "feature_map"], inputs)
    with np.load(tmp_path / "explain.npz", allow_pickle=False) as archive:
        arrays = dict(archive.items())
    length = np.linalg.norm(cells.mean((2, 3)), axis=1)[:, None, None, None] if arrays["unit"] else 1.0
    maps = np.einsum("cd,ndhw->nchw", arrays["matrix"], cells) / length
    np.testing.assert_allclose(maps.mean((2, 3)), logits, atol=2e-4)
    assert (explain.images, explain.map, explain.thumbnails) == (8, cells.shape[2:], True)
    assert explain.bytes == (tmp_path / "explain.npz").stat().st_size
    assert arrays["graph"].item().decode() == sha256_of(tmp_path / STUDENT_NAME)
    assert np.bincount(arrays["row_class"]).tolist() == [2] * CLASSES  # of 9, the same for each class
    ends = arrays["names_ends"].tolist()
    names = [arrays["names"].tobytes()[a:b].decode() for a, b in zip([0, *ends], ends, strict=False)]
    chosen = [train.sample_ids.index(name) for name in names]
    np.testing.assert_allclose(arrays["rows"].astype(np.float32), feature[chosen], atol=1e-3)
    small = Image.open(io.BytesIO(arrays["thumbnails"].tobytes()[: arrays["thumbnails_ends"][0]]))
    assert small.size == (16, 8) and "comment" not in small.info


def test_the_output_of_the_map_changes_no_logit():
    model, pixels, strength = network(), train_images().images, torch.ones(12, 1)
    plain, mapped = (
        ServedStudent(model, [0.5] * 3, [0.25] * 3, [0.0] * CLASSES, with_map=with_map).eval()
        for with_map in (False, True)
    )
    with torch.inference_mode():
        for one, other in zip(plain(pixels, strength), mapped(pixels, strength)[:2], strict=True):
            assert torch.equal(one, other)


def test_a_feature_that_is_not_the_mean_of_a_map_is_refused_in_one_line(tmp_path):
    class Session:
        def run(self, _names, inputs):
            cells = np.random.default_rng(0).uniform(size=(len(inputs["image"]), D, 2, 2)).astype(np.float32)
            return [np.full((len(cells), D), D**-0.5, np.float32), cells]

    (tmp_path / STUDENT_NAME).write_bytes(b"graph")
    with pytest.raises(StageError, match=r"does not end in global average pooling; set serving\.explain\.map: false"):
        write_explanations(tmp_path, Session(), network(), train_images(), ExplainParams(map=True))
    with pytest.raises(NoFeatureMapError):
        build_backbone("torchvision/vit_b_16", 32).with_map(torch.zeros(1, 3, 32, 32))


def test_students_without_one_class_matrix_have_no_map():
    gated = network(LinearHead(D, CLASSES, gated=True))
    assert class_rows(gated) is None
    with pytest.raises(StageError, match="no single cosine or linear classifier"):
        check_map(gated)


def test_a_torchvision_network_has_a_map():
    torch.manual_seed(0)
    backbone = build_backbone("torchvision/resnet18").eval()
    with torch.inference_mode():
        features, cells = backbone.with_map(torch.randn(2, 3, 64, 64))
    assert cells.shape == (2, 512, 2, 2)
    torch.testing.assert_close(cells.mean((2, 3)), features)


def test_an_index_above_the_limit_or_below_the_classes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(explanations, "MAX_BYTES", 2 * D * 5)
    for images, message in (
        (12, r"images is 12; 5 images of this network fill"),
        (3, r"images is 3; expected at least 4"),
    ):
        with pytest.raises(StageError, match=message):
            write_explanations(tmp_path, None, network(), train_images(), ExplainParams(images=images))
    assert write_explanations(tmp_path, None, network(), train_images(), ExplainParams()) is None
    assert not list(tmp_path.iterdir())
