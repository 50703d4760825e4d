"""Fixtures of the serving tests: a tiny release, and one Triton server on it for the whole session.

With TAILOR_TEST_BACKENDS that server runs as in a container: see tests/support/container.py.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from models.preprocess import ROOM, preprocess
from models.prior import log_class_prior, softmax
from serving.repository.manifest import GOLDEN_NAME, MANIFEST_NAME, STUDENT_NAME, Manifest, sha256_of
from serving.repository.writer import write_repository
from serving.server.triton_server import TritonServer
from tests.support.container import Container, backends, running_container
from tests.support.stand_in import calls, classifier, student  # noqa: F401 (fixtures)

CLASSES = ["ant", "bee", "cat: big", "dög", "emu"]
COUNTS = [1000, 300, 90, 27, 8]
SIZE = 8
FEATURE_DIM = 4
TOP_K = 3
MAX_BATCH_SIZE = 8
TAU_S = 0.1
ADMIN_KEY = "a-key-known-to-the-tests"


@dataclass(frozen=True)
class Release:
    """A tiny export, and reference results to compare a server's responses with."""

    export_dir: Path
    manifest: Manifest

    def logits(self, images: list[bytes], strength: float = 0.0) -> np.ndarray:
        """Compute the graph's logits [B,C] with ONNX Runtime, without Triton."""
        return run_graph(self.export_dir / STUDENT_NAME, [preprocess(image, SIZE, SIZE) for image in images], strength)[
            0
        ]

    def probabilities(self, images: list[bytes], log_prior: np.ndarray) -> np.ndarray:
        """Compute the expected probabilities of the classifier, [B,C], with numpy from the balanced logits."""
        return softmax(self.logits(images).astype(np.float64) + log_prior)


def run_graph(path: Path, images: list[np.ndarray], strength: float) -> list[np.ndarray]:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    strengths = np.full((len(images), 1), strength, dtype=np.float32)
    return session.run(["logits", "feature"], {"image": np.stack(images), "strength": strengths})


def encode(pixels: np.ndarray, form: str = "PNG") -> bytes:
    """Encode uint8 [H,W,3] or [H,W] as an image file."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form)
    return stream.getvalue()


def picture(seed: int) -> bytes:
    """Return a PNG of noise with the input size of the tiny network."""
    return encode(np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))


def write_graph(path: Path, seed: int) -> None:
    """Write an ONNX graph: image and strength to cosine logits and feature, by a random projection of the pixels."""
    random = np.random.default_rng(seed)
    weights = random.normal(size=(FEATURE_DIM, len(CLASSES)))
    constants = {
        "half": np.float32(127.5),
        "tiny": np.float32(0.01),  # so that the feature of a black image is not zero
        "flat": np.array([0, -1], dtype=np.int64),
        "last": np.array([1], dtype=np.int64),
        "projection": random.normal(size=(3 * SIZE * SIZE, FEATURE_DIM)).astype(np.float32),
        "weights": (weights / np.linalg.norm(weights, axis=0) / TAU_S).astype(np.float32),
        "log_prior": log_class_prior(COUNTS).astype(np.float32)[None],
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["pixels", "half"], ["contrast"]),
        helper.make_node("Add", ["contrast", "tiny"], ["scaled"]),
        helper.make_node("Reshape", ["scaled", "flat"], ["row"]),
        helper.make_node("MatMul", ["row", "projection"], ["projected"]),
        helper.make_node("ReduceL2", ["projected", "last"], ["norm"], keepdims=1),
        helper.make_node("Div", ["projected", "norm"], ["feature"]),
        helper.make_node("MatMul", ["feature", "weights"], ["balanced"]),
        helper.make_node("Mul", ["strength", "log_prior"], ["adjustment"]),
        helper.make_node("Add", ["balanced", "adjustment"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [
            helper.make_tensor_value_info("image", TensorProto.UINT8, ["B", 3, SIZE, SIZE]),
            helper.make_tensor_value_info("strength", TensorProto.FLOAT, ["B", 1]),
        ],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", len(CLASSES)]),
            helper.make_tensor_value_info("feature", TensorProto.FLOAT, ["B", FEATURE_DIM]),
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


def write_export(folder: Path, version: int = 1, **keys: Any) -> Manifest:
    """Write an export folder in the form of `pipeline.export`, with golden requests computed by ONNX Runtime.

    keys: of the manifest, in addition. A temperature is in the golden requests too.
    """
    folder.mkdir(parents=True)
    write_graph(folder / STUDENT_NAME, seed=version)
    golden = []
    for seed, strength in ((1, 0.0), (2, 1.0)):
        image = picture(seed)
        adjustment = strength * log_class_prior(COUNTS)
        balanced = run_graph(folder / STUDENT_NAME, [preprocess(image, SIZE, SIZE)], 0.0)[0]
        p = softmax(balanced / keys.get("calibration", {}).get("temperature", 1.0) + adjustment)[0]
        best = np.argsort(-p)[:TOP_K]
        golden.append(
            {
                "image": base64.b64encode(image).decode(),
                "strength": strength,
                "index": best.tolist(),
                "probability": p[best].tolist(),
            }
        )
    (folder / GOLDEN_NAME).write_text(json.dumps(golden))
    (folder / "model_card.md").write_text("# A tiny student\n")
    manifest = Manifest(
        version=version,
        classes=CLASSES,
        counts=COUNTS,
        log_prior=log_class_prior(COUNTS).tolist(),
        image={"size": SIZE, "resize_to": SIZE, "room": ROOM},
        feature_dim=FEATURE_DIM,
        tau_s=TAU_S,
        strength=0.5,
        top_k=TOP_K,
        max_batch_size=MAX_BATCH_SIZE,
        files={name: sha256_of(folder / name) for name in (STUDENT_NAME, GOLDEN_NAME, "model_card.md")},
        params_sha256="0" * 64,
        data_sha256="0" * 64,
        code_revision="none",
        versions={},
        metrics={},
        **keys,
    )
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json())
    return manifest


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    folder = tmp_path_factory.mktemp("release") / "export"
    return Release(folder, write_export(folder))


@pytest.fixture(scope="session")
def repository(release: Release, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A path with a space, which Triton itself does not support.
    return write_repository(release.export_dir, tmp_path_factory.mktemp("with space") / "repository")


@pytest.fixture(scope="session")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer | Container]:
    folder = tmp_path_factory.mktemp("server")
    if backends():
        with running_container(repository, folder, ADMIN_KEY) as contained:
            yield contained
        return
    log = folder / "triton.log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAILOR_ADMIN_KEY", ADMIN_KEY)
        started = TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0, log=log).start()
    yield started
    started.stop()


@pytest.fixture
def tailor(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line in an empty folder: tailor("predict", "cat.png")."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipeline.commands", *map(str, arguments)]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    return run


@pytest.fixture(scope="module")
def exports(release: Release, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Release]:
    """Exports with different graphs, by the version number that each gets when promoted in order."""
    folder = tmp_path_factory.mktemp("exports")
    return {1: release} | {n: Release(folder / str(n), write_export(folder / str(n), version=n)) for n in range(2, 10)}


@pytest.fixture
def root(repository: Path, tmp_path: Path) -> Path:
    return shutil.copytree(repository, tmp_path / "repository")


@pytest.fixture
def serving(root: Path) -> Iterator[TritonServer]:
    """A server on a separate copy of the repository, which a test may change."""
    server = TritonServer(root, http_port=0, grpc_port=0, metrics_port=0).start()
    yield server
    server.stop(at_once=True)
