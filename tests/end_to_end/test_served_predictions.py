"""From images to served predictions: Triton's response for a test image equals the evaluation's prediction."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from models.prior import adjust_logits, softmax
from serving.client.sync_client import Client
from serving.golden.dry_run import dry_run
from serving.repository.manifest import read_manifest
from serving.repository.release import find_releases
from serving.server.triton_server import TritonServer
from tests.support.project import ROOT, SHORT, Project

pytestmark = pytest.mark.end_to_end

PHOTOGRAPHS = Path(os.environ.get("TAILOR_IMAGE_PACKS", ROOT.parent / "shared/data"))
PACKS = ("cifar10-train.parquet", "cifar10-test.parquet")


def serve(project: Project) -> TritonServer:
    return TritonServer(project.root / "artifacts/repository", http_port=0, grpc_port=0, metrics_port=0)


def assert_served_as_evaluated(project: Project, images: list[bytes], logits: np.ndarray, tolerance: float) -> None:
    """Assert that both protocols and priors return the classes and probabilities of predictions.parquet's logits."""
    logits = logits / read_manifest(project.root / "artifacts/export").calibration.temperature
    log_prior = np.array(json.loads((project.root / "artifacts/prior.json").read_text())["log_prior"])
    expected = {"balanced": softmax(logits), "train": softmax(adjust_logits(logits, log_prior, 1.0))}
    with serve(project) as server:
        for url in (server.http_url, server.grpc_url):
            with Client(url) as client:
                for prior, probabilities in expected.items():
                    for answer, row in zip(client.predict(images, prior), probabilities, strict=True):
                        assert np.allclose(answer.probabilities, row[list(answer.indexes)], rtol=0, atol=tolerance)
                        assert np.allclose(answer.probabilities, np.sort(row)[::-1][:5], rtol=0, atol=tolerance)


def some_digits(project: Project) -> tuple[list[bytes], np.ndarray]:
    """Write test scans as PNG files; return them with the logits of the evaluation."""
    from sklearn.datasets import load_digits

    table = pyarrow.parquet.read_table(project.root / "artifacts/evaluation/predictions.parquet").to_pylist()[::40]
    scans = load_digits().images
    images = []
    for row in table:
        stream = io.BytesIO()
        pixels = np.round(scans[int(row["sample_id"].removeprefix("digits/"))] * (255 / 16)).astype(np.uint8)
        Image.fromarray(pixels).save(stream, format="PNG")
        images.append(stream.getvalue())
    return images, np.array([row["logits"] for row in table])


@pytest.mark.xdist_group("digits")
def test_served_digits_match_the_evaluation(digits):
    assert_served_as_evaluated(digits, *some_digits(digits), 1e-4)


@pytest.mark.xdist_group("digits")
def test_digits_served_in_float16_match_the_evaluation(digits, tmp_path):
    project = Project(tmp_path / "half")
    for name in ("artifacts", "data/split"):
        shutil.copytree(digits.root / name, project.root / name)
    shutil.copy(digits.root / "params.yaml", project.root)
    graph = project.root / "artifacts/export/student.onnx"
    full_size = graph.stat().st_size
    project.set({"export": {"precision": "float16"}})
    done = project.run("python", "-m", "pipeline.export")
    (release,) = find_releases(project.root / "artifacts/repository")
    float16 = release.manifest.half
    assert 0 < float16.logit <= 0.002 * 30 and float16.agreement >= 0.98 and float16.images == 100
    assert f"{float16.logit:.1e}, in float16 {float16.agreement:.1%} of 100 images keep their class" in done.stdout
    assert graph.stat().st_size < 0.55 * full_size
    temperature = release.manifest.calibration.temperature
    assert release.golden[0].tolerance == pytest.approx(0.002 + float16.logit / temperature)
    dry_run(project.root / "artifacts/repository", [release], 60)
    assert_served_as_evaluated(project, *some_digits(project), 0.015)

    before = (project.root / "artifacts/export/manifest.json").read_bytes()
    project.set({"export": {"half": {"tolerance": 1e-6}}})
    done = project.run("python", "-m", "pipeline.export", expect=1)
    assert done.stderr.count("\n") == 1 and "above export.half.tolerance = 1e-06" in done.stderr
    assert (project.root / "artifacts/export/manifest.json").read_bytes() == before


@pytest.mark.timeout(1800)  # its training may take this long on a busy machine
@pytest.mark.xdist_group("photographs")
@pytest.mark.skipif(
    not all((PHOTOGRAPHS / name).is_file() for name in PACKS),
    reason=f"no CIFAR-10 pack: {' and '.join(PACKS)} are not in {PHOTOGRAPHS} (set TAILOR_IMAGE_PACKS to their folder); "
    "real photographs were NOT trained, exported and served by this run",
)
def test_real_photographs_are_trained_exported_and_served(tmp_path):
    project = Project(tmp_path / "project")
    project.run("python", "-m", "pipeline.commands", "recipe", "recipes/cifar10-parquet-if100-one-epoch.yaml")
    project.set({"data": {"location": str(PHOTOGRAPHS)}})
    project.commit()
    done = project.run("dvc", "repro", timeout=1800)
    assert "12,306 train, 1,000 validation, 10,000 test" in done.stdout
    counts = json.loads((project.root / "artifacts/prior.json").read_text())["counts"]
    assert counts == [4900, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    metrics = json.loads((project.root / "artifacts/evaluation/metrics.json").read_text())
    assert metrics["student"]["balanced"]["few"] is None
    assert metrics["student"]["balanced"]["all"] > 0.12  # after one epoch: low, but above chance

    table = pyarrow.parquet.read_table(project.root / "artifacts/evaluation/predictions.parquet").to_pylist()[::400]
    packed = pyarrow.parquet.read_table(PHOTOGRAPHS / PACKS[1], columns=["name", "image"]).to_pydict()
    by_name = dict(zip(packed["name"], packed["image"], strict=True))
    images = [by_name[row["sample_id"]] for row in table]
    assert_served_as_evaluated(project, images, np.array([row["logits"] for row in table]), 1e-4)


@pytest.mark.xdist_group("folder")
def test_a_folder_of_images_becomes_a_served_classifier(tmp_path):
    project = Project(tmp_path / "my own images")
    make_folder(project.root / "data/source", per_class=(60, 40, 25))
    project.set(SHORT)
    project.set({"data": {"source": "folder", "profile": "natural", "test_per_class": 8, "validation_per_class": 3}})
    project.set({"student": {"queue_total": 64}, "serving": {"top_k": 2}, "evaluate": {"top_k": 2}})
    project.commit()
    project.run("dvc", "repro")
    assert json.loads((project.root / "data/split/classes.json").read_text()) == ["blue", "green", "red"]
    image = next((project.root / "data/source/red").glob("*.jpg"))
    with serve(project) as server:
        command = [sys.executable, "-m", "serving.commands", "predict", str(image), "--url", server.http_url, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=project.root)
    (answer,) = json.loads(done.stdout)
    best, second = answer["predictions"]
    assert best["class"] == "red" and second["class"] in ("blue", "green")
    assert best["probability"] > second["probability"]


def make_folder(root: Path, per_class: tuple[int, ...]) -> None:
    """Write noisy pictures of one colour per class, as JPEG and PNG files, in many sizes, none of them greyscale."""
    generator = np.random.default_rng(0)
    for channel, (name, count) in enumerate(zip(("red", "green", "blue"), per_class, strict=True)):
        (root / name).mkdir(parents=True)
        for number in range(count):
            height, width = generator.integers(20, 60, 2)
            pixels = generator.integers(0, 90, (height, width, 3), dtype=np.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels).save(root / name / f"{number:03d}.{'png' if number % 3 == 0 else 'jpg'}")
