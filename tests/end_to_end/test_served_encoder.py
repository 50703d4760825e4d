"""Frozen encoder, adapter and head served as one graph: Triton's responses equal PyTorch's and the evaluation's."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow.parquet
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
from models.prior import adjust_logits, softmax
from pipeline.data.dataset import evaluation_images
from pipeline.model_io.checkpoint import attach_encoder, load_model
from pipeline.shared.artifacts import EVALUATION, EXPORT, PRIOR, REPOSITORY, STUDENT
from serving.client.sync_client import Client
from serving.repository.manifest import load_manifest
from serving.server.triton_server import TritonServer
from tests.support.making import write
from tests.support.small_encoder import tiny_encoder, tiny_params

pytestmark = [pytest.mark.end_to_end, pytest.mark.slow, pytest.mark.timeout(900)]

STAGES = (pipeline.split, pipeline.prior, pipeline.embed, pipeline.teacher, pipeline.student, pipeline.evaluate)
# With tau_s 1 no probability is near 0 or 1, so a small difference of the pixels changes each of them.
CHANGES = {
    "image.interpolation": "bicubic", "student.queue_total": 64, "serving.top_k": 2, "evaluate.top_k": 2,
    "teacher.tau_s": 1.0, "student.tau_s": 1.0,
}  # fmt: skip
ENCODERS = {
    "tiny": {},  # a ViT
    "efficientnet_lite0": {
        "encoder": {"name": "efficientnet_lite0"}, "image.size": 64, "image.resize_to": 64,
        "export.half": {"tolerance": 0.005, "agreement": 0.98},  # export refuses the default, .002, for these images
    },
}  # fmt: skip


def photographs(root):
    """Write JPEG files of two classes, larger than the network's input, so that their pixels depend on the interpolation."""
    draw = np.random.default_rng(0)
    for channel, (name, count) in enumerate((("red", 24), ("green", 12))):
        for number in range(count):
            height, width = draw.integers(70, 120, 2)
            pixels = draw.integers(0, 150, (height, width, 3), dtype=np.uint8)
            pixels[..., channel] += 100
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, "JPEG", quality=92)
            write(root / name / f"{number:03}.jpg", stream.getvalue())
    return root


def expected_logits(params, interpolation):
    """Compute the logits [N,C] of the test images by PyTorch, in the release's image format with another interpolation."""
    model, config = load_model(STUDENT, "student")
    attach_encoder(model, config, params, STUDENT)
    form = load_manifest(EXPORT).image.model_copy(update={"interpolation": interpolation})
    test = evaluation_images(params, "test")
    images = [test.encoded(index) for index in range(len(test))]
    pixels = torch.from_numpy(np.stack([form.pixels(image) for image in images]))
    mean, std = (torch.tensor(getattr(params.image, key)).view(3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        logits = model.eval()((pixels / 255 - mean) / std)[1].double().numpy()
    return images, logits, list(test.sample_ids)


def assert_served(images, logits, tolerance):
    """Assert that both protocols return the probabilities of these balanced logits under every kind of prior."""
    if calibration := load_manifest(EXPORT).calibration:
        logits = logits / calibration.temperature
    log_prior = np.array(json.loads(PRIOR.read_text())["log_prior"])
    own = np.array([0.9, 0.1])
    expected = {
        "balanced": softmax(logits),
        "train": softmax(adjust_logits(logits, log_prior, 1.0)),
        0.5: softmax(adjust_logits(logits, log_prior, 0.5)),
        "own": softmax(logits + np.log(own)),
    }
    with TritonServer(REPOSITORY, http_port=0, grpc_port=0, metrics_port=0) as server:
        for url in (server.http_url, server.grpc_url):
            with Client(url) as client:
                for prior, probabilities in expected.items():
                    answers = client.predict(images, own if prior == "own" else prior)
                    for answer, row in zip(answers, probabilities, strict=True):
                        assert np.allclose(answer.probabilities, row[list(answer.indexes)], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_jpeg_is_answered_as_by_the_pipeline_in_float32_and_float16(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights, images = tiny_encoder(tmp_path, monkeypatch, interpolation="bicubic"), photographs(tmp_path / "images")
    params = tiny_params(weights, images, CHANGES | ENCODERS[name])
    for stage in STAGES:
        stage.run(params)
    exported = pipeline.export.run(params)
    assert exported.difference <= params.export.tolerance
    photos, logits, names = expected_logits(params, "bicubic")
    bilinear = expected_logits(params, "bilinear")[1]
    assert np.abs(softmax(bilinear) - softmax(logits)).max() > 5e-4
    evaluated = pyarrow.parquet.read_table(EVALUATION / "predictions.parquet").to_pylist()
    rows = {row["sample_id"]: row["logits"] for row in evaluated}
    # Features are stored in float16: a cosine differs by up to 0.001.
    assert np.abs(logits - [rows[each] for each in names]).max() <= 0.001 / params.student.tau_s
    assert_served(photos, logits, 1e-4)

    half = params.model_copy(update={"export": params.export.model_copy(update={"precision": "float16"})})
    graph = EXPORT / "student.onnx"
    full_size = graph.stat().st_size
    assert pipeline.export.run(half).half.agreement >= params.export.half.agreement
    assert graph.stat().st_size < 0.6 * full_size
    assert_served(photos, logits, 0.003)
