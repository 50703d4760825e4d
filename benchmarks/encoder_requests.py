"""Latency of one request to a served encoder against the encoder alone: `python -m benchmarks.encoder_requests`.

All sides run in turns on the same cores, one request at a time. The encoder alone is its ONNX graph in ONNX Runtime, with
all cores and normalised pixels in memory. The exported graph is student.onnx of the release in the same way, with uint8
pixels: normalisation, encoder, adapter, classifier and logit adjustment. A request to `student` contains pixels. A request to
`classifier` contains a JPEG of the same size, which the server decodes. Adapter and classifier of the release have random
weights. A ratio is the median over rounds, with the smallest and the largest. Goal: at most 1.15.

  python -m benchmarks.encoder_requests --encoder efficientnet_lite0 --size 224
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from benchmarks.encoders import prepared
from benchmarks.serving_load import WARM_UP, Load, TurnResult, run
from benchmarks.serving_releases import photo
from benchmarks.serving_sections import as_http, port_of
from benchmarks.serving_turns import Side, in_rounds, median, ratios
from models.networks.backbones import build_backbone
from models.networks.encoders import ENCODERS
from pipeline import embed, evaluate, export, prior
from pipeline.features.stored import stored_encoder
from pipeline.model_io.checkpoint import ModelConfig, build_model, save_model
from pipeline.model_io.encoder import load_encoder
from pipeline.onnx_export.graph import TRACED_BATCH, trace
from pipeline.onnx_export.release import open_session
from pipeline.params import Params
from pipeline.shared.artifacts import EXPORT, REPOSITORY, STUDENT, TEACHER, sha256_of
from serving.client import Client
from serving.server.triton_server import TritonServer
from serving.transport.messages import Infer

GOAL = 1.15
IMAGES = 24  # images in the generated data set, and different images in the requests
CLASSES, ADAPTER = 2, 320


def with_weights(params: Params, folder: Path) -> Params:
    """Return params whose encoder loads without a network: random weights, unless a Python package has the weights."""
    assert params.encoder is not None
    encoder = ENCODERS[params.encoder.name]
    if encoder.package:
        return params
    path = folder / "random.safetensors"
    safetensors.torch.save_file(build_backbone(f"timm/{encoder.model}").network.state_dict(), path)
    changes = {"weights": str(path), "sha256": sha256_of(path), "licence": encoder.accept or None}
    return params.model_copy(update={"encoder": params.encoder.model_copy(update=changes)})


def make_release(params: Params) -> None:
    """Run the stages without training: teacher and student have random weights."""
    prior.run(params)
    embed.run(params)
    image, tau_s = params.image, params.student.tau_s
    config = ModelConfig(
        "encoder", CLASSES, tau_s, image.size, image.mean, image.std,
        encoder=stored_encoder(params), adapter=ADAPTER, interpolation=image.interpolation,
    )  # fmt: skip
    for output in (TEACHER, STUDENT):
        save_model(build_model(config, "student.backbone").state_dict(), config, output)
    evaluate.run(params)
    export.run(params)


def graph_sides(params: Params) -> dict[str, Side]:
    """Time the encoder alone and the exported graph: one image at a time in ONNX Runtime, on all cores."""
    assert params.encoder is not None
    size, draw = params.image.size, np.random.default_rng(0)
    network = load_encoder(params.encoder, params.image).network
    graph = trace(network, {"pixels": torch.zeros(TRACED_BATCH, 3, size, size)}, ["features"], params.export.opset)
    normalised = {"pixels": draw.normal(size=(1, 3, size, size)).astype(np.float32)}
    image = {
        "image": draw.integers(0, 256, (1, 3, size, size), dtype=np.uint8), "strength": np.zeros((1, 1), np.float32),
    }  # fmt: skip
    return {
        "encoder alone": graph_side(graph.SerializeToString(), "features", normalised),
        "exported graph": graph_side(EXPORT / "student.onnx", "logits", image),
    }


def graph_side(graph: Path | bytes, output: str, inputs: dict[str, np.ndarray]) -> Side:
    """Time one output of a graph in ONNX Runtime. Its session exists only during a turn, because its threads spin."""

    def side(seconds: float) -> TurnResult:
        session = open_session(graph)
        ends = time.perf_counter() + (1 + WARM_UP) * seconds
        latencies: list[float] = []
        while not latencies or time.perf_counter() < ends:
            started = time.perf_counter()
            session.run([output], inputs)
            latencies.append(time.perf_counter() - started)
        measured = np.array(latencies[int(len(latencies) * WARM_UP / (1 + WARM_UP)) :]) * 1000
        return TurnResult(1000 / measured.mean(), measured, 0.0)

    return side


def served_sides(server: TritonServer, size: int) -> dict[str, Side]:
    """Time one request at a time to each of the two models, over HTTP."""
    draw = np.random.default_rng(0)
    strength = np.zeros((1, 1), np.float32)
    pixels = draw.integers(0, 256, (IMAGES, 1, 3, size, size), dtype=np.uint8)
    calls = [Infer("student", {"image": image, "strength": strength}, {"logits": 0}) for image in pixels]
    with Client(server.http_url) as client:
        photos = [client.request([photo(draw, size, size)], "balanced") for _ in range(IMAGES)]
    port = port_of(server.http_url)
    return {
        name: functools.partial(run, Load(port, [as_http(call) for call in requests], users=1))
        for name, requests in (("student, pixels", calls), ("classifier, JPEG", photos))
    }


def main() -> int:
    """Print p50 of each side and the ratios; returns 0 if all meet the goal."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--encoder", default="efficientnet_lite0", choices=list(ENCODERS))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a turn (default: 3)")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        params = with_weights(prepared(options.encoder, options.size, IMAGES, Path(folder)), Path(folder))
        make_release(params)
        with TritonServer(REPOSITORY, http_port=0, grpc_port=0, metrics_port=0) as server:
            sides = {**graph_sides(params), **served_sides(server, options.size)}
            turns = in_rounds(options.encoder, sides, options.rounds, options.seconds)
    alone, met = turns.pop("encoder alone"), True
    print(f"encoder alone: p50 {median(alone, 'p50'):.1f} ms; {len(os.sched_getaffinity(0))} cores")
    for name, records in turns.items():
        ratio, middle = ratios(records, alone, "p50"), median(records, "p50")
        met &= sorted(ratio)[len(ratio) // 2] <= GOAL
        spread = f"{sorted(ratio)[len(ratio) // 2]:.2f} ({min(ratio):.2f} to {max(ratio):.2f})"
        print(f"{name}: p50 {middle:.1f} ms; ratio {spread}, goal {GOAL}")
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
