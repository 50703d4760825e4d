"""A class added to a release without training: the graph, the gate, the release, and the next split."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pipeline.embed
import pipeline.evaluate
import pipeline.export
import pipeline.prior
import pipeline.split
import pipeline.student
import pipeline.teacher
from models.networks.cosine_classifier import ImageClassifier
from models.prior import log_class_prior
from pipeline.commands.app import main
from pipeline.data.split_tables import load_classes, read_split
from pipeline.evaluation.predictions import Contender, load_predictions
from pipeline.onnx_export.added_class import Rules, add_class
from pipeline.onnx_export.graph import ServedStudent, to_onnx
from pipeline.onnx_export.larger_release import append_class
from pipeline.onnx_export.release import open_session
from pipeline.shared.artifacts import EXPORT
from pipeline.shared.errors import DataError, ParamsError, StageError
from serving.golden.dry_run import dry_run
from serving.repository.release import read_champion
from tests.support.making import encode, write
from tests.support.small_encoder import tiny_encoder, tiny_params


@pytest.mark.parametrize("shift", [None, [0.5, -0.2, 0.3]])
def test_the_larger_graph_equals_a_network_with_one_more_row(tmp_path, shift):
    torch.manual_seed(0)
    model = ImageClassifier("resnet20", 3, 1 / 30, 16).eval()
    mean = [0.5] * 3
    path = write(
        tmp_path / "student.onnx", to_onnx(ServedStudent(model, mean, mean, [-1.0, -2.0, -3.0], shift).eval(), 16, 20)
    )
    prototype = np.random.default_rng(0).normal(size=64)
    prototype /= np.linalg.norm(prototype)
    log_prior = [-1.5, -4.0, -2.5, -3.5]
    larger = ImageClassifier(model.backbone, 4, 1 / 30).eval()
    with torch.no_grad():
        rows = model.classifier.weight.numpy()
        larger.classifier.weight.copy_(torch.from_numpy(np.insert(rows, 1, prototype, axis=0)))
    bias = None if shift is None else np.insert(shift, 1, np.mean(shift)).tolist()
    pixels = np.random.default_rng(1).integers(0, 256, (5, 3, 16, 16), dtype=np.uint8)
    strength = np.array([[0.0], [1.0], [0.3], [2.0], [-1.0]], np.float32)
    with torch.no_grad():
        network = ServedStudent(larger, mean, mean, log_prior, bias).eval()
        expected = network(torch.from_numpy(pixels), torch.from_numpy(strength))[0].numpy()
    session = open_session(append_class(path, prototype * 30, 1, log_prior))
    actual = session.run(["logits"], {"image": pixels, "strength": strength})[0]
    np.testing.assert_allclose(actual, expected, atol=1e-4)
    assert session.get_outputs()[0].shape[-1] == 4


COLOURS = {"red": (200, 40, 40), "green": (40, 190, 60), "blue": (30, 60, 210), "yellow": (230, 220, 40)}


def coloured(name, seed):
    noise = np.random.default_rng(seed).integers(-30, 30, (32, 32, 3))
    return encode(Image.fromarray((np.array(COLOURS[name]) + noise).clip(0, 255).astype(np.uint8)))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A trained and exported project of red, green and blue images; the working folder is the project."""
    root = tmp_path_factory.mktemp("added_class")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        weights = tiny_encoder(root, patch)
        for offset, (name, count) in enumerate({"red": 30, "green": 20, "blue": 12}.items()):
            for number in range(count):
                write(root / f"images/{name}/{number}.png", coloured(name, 1000 * offset + number))
        changes = {"student.epochs": 6, "student.gamma": 1.0, "export.golden": 3, "data.test_per_class": 4}
        made = tiny_params(weights, root / "images", changes)
        stages = (
            pipeline.split, pipeline.prior, pipeline.embed, pipeline.teacher, pipeline.student, pipeline.evaluate,
            pipeline.export,
        )  # fmt: skip
        for stage in stages:
            stage.run(made)
        yield made


def files_of(name, count, folder="new"):
    return [write(Path(f"{folder}/{name}-{number}.png"), coloured(name, 9000 + number)) for number in range(count)]


@pytest.mark.slow
def test_a_class_is_added_served_and_taken_over_by_the_next_split(project):
    files = [*files_of("yellow", 12), write(Path("new/damaged.png"), b"no image")]
    result = add_class(project, "yellow", files, EXPORT, Path("artifacts/added_class"), Rules())
    assert result.promote and result.after >= result.before - 0.01 and (result.images, result.held_out) == (7, 5)
    assert len(result.skipped) == 1 and "12 images added" in result.ingested and "new classes yellow" in result.ingested
    release = read_champion(Path("artifacts/added_class/repository"))
    manifest = release.manifest
    assert release.version == 2 and manifest.classes == ["blue", "green", "red", "yellow"]
    assert manifest.counts[-1] == 7 and np.allclose(manifest.log_prior, log_class_prior(manifest.counts))
    dry_run(Path("artifacts/added_class/repository"), [release], 60)  # sends the golden requests to the graph
    assert len(release.golden) == 5
    evidence = Path("artifacts/added_class/repository/classifier/2")
    assert json.loads((evidence / "decision.json").read_text())["promote"] is True
    stored = load_predictions(Contender(evidence / "predictions.parquet", evidence / "prior.json"))
    assert stored.prior.classes == manifest.classes and len(stored.labels) == 12
    assert pipeline.split.run(project).ingested == 12
    assert load_classes() == manifest.classes
    assert (read_split("train", ["label"]).column("label").to_numpy() == 3).sum() == 12
    with pytest.raises(StageError, match=r"the release has other classes than data/split/classes.json"):
        add_class(project, "violet", files, EXPORT, Path("artifacts/again"), Rules())


@pytest.mark.slow
def test_the_gate_refuses_and_nothing_is_ingested(project, capsys):
    pipeline.split.run(project)
    before = sorted(Path("data/ingested").glob("*"))
    if before:  # after the test above
        for path in before:
            path.unlink()
        pipeline.split.run(project)
    for number in range(8):  # a second class of red images takes those of the old one
        write(Path(f"crimson/{number}.png"), coloured("red", 5000 + number))
    write(Path("params.yaml"), json.dumps(project.model_dump(mode="json")).encode())
    assert (
        main(["add-class", "crimson", "crimson", "--output", "artifacts/refused", "--floor", "1.0", "--margin", "0"])
        == 1
    )
    assert "class 'crimson' refused: old classes" in capsys.readouterr().out
    assert [path.name for path in Path("artifacts/refused").iterdir()] == ["decision.json"]
    assert not list(Path("data/ingested").glob("*"))
    for name, message in (("red", "is a class already"), (" x", "expected printable text")):
        with pytest.raises(ParamsError, match=message):
            add_class(project, name, files_of("yellow", 3), EXPORT, Path("artifacts/x"), Rules())
    with pytest.raises(DataError, match="1 usable image of class 'yellow'; expected at least 2"):
        add_class(project, "yellow", files_of("yellow", 1), EXPORT, Path("artifacts/x"), Rules())


def test_a_graph_without_a_class_matrix_is_refused(tmp_path):
    model = torch.nn.Linear(4, 2)
    path = tmp_path / "other.onnx"
    torch.onnx.export(model, (torch.zeros(1, 4),), str(path), dynamo=True, verbose=False)
    with pytest.raises(StageError, match="has no cosine classifier of one row per class"):
        append_class(path, np.zeros(4), 0, [0.0])
