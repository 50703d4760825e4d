"""A tiny release of task segmentation, whose network takes the class of a pixel from its colour, and a server on it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from models.preprocess import ROOM
from models.prior import log_class_prior
from serving.golden.student_call import StudentCall
from serving.repository.manifest import (
    GOLDEN_NAME,
    MANIFEST_NAME,
    STUDENT_NAME,
    Golden,
    Manifest,
    SegmentationFormat,
    sha256_of,
)
from serving.repository.writer import runtime_sha256, write_repository
from serving.server.triton_server import TritonServer
from serving.shared.names import SEGMENTER
from tests.support.making import encode

CLASSES = ["road", "car & bus", "sign"]
COLOURS = np.array([[90, 90, 90], [220, 30, 30], [30, 30, 220]], dtype=np.uint8)
COUNTS = [9000, 900, 100]
CANVAS, CELLS = (8, 12), (4, 6)


def street(width: int = 12, height: int = 8) -> bytes:
    """Return a PNG: the left half is road, the rest is car above and sign below."""
    labels = np.zeros((height, width), dtype=np.uint8)
    labels[: height // 2, width // 2 :], labels[height // 2 :, width // 2 :] = 1, 2
    return encode(COLOURS[labels])


def write_graph(path: Path, scale: float = 20.0) -> None:
    """Write an ONNX graph in the form of `pipeline.export`: cells of 2x2 pixels, logits from their mean colour."""
    weights = scale / 255 * np.array([[0, 0, 0], [1, -0.5, -0.5], [-0.5, -0.5, 1]], dtype=np.float32)
    constants = {
        "weights": weights[:, :, None, None].repeat(2, 2).repeat(2, 3) / 4,
        "bias": np.array([scale / 4, 0, 0], dtype=np.float32),
        "after": np.array([2, 3], dtype=np.int64),
        "scales": np.array([1, 1, 2, 2], dtype=np.float32),
        "most": np.float32(255),
        "classes": np.array([1], dtype=np.int64),
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["pixels", "weights", "bias"], ["balanced"], strides=[2, 2]),
        helper.make_node("Unsqueeze", ["adjustment", "after"], ["added"]),
        helper.make_node("Add", ["balanced", "added"], ["logits"]),
        helper.make_node("Resize", ["logits", "", "scales"], ["full"], mode="linear"),
        helper.make_node("ArgMax", ["full"], ["index"], axis=1, keepdims=0),
        helper.make_node("Cast", ["index"], ["class_map"], to=TensorProto.UINT8),
        helper.make_node("Softmax", ["full"], ["probability"], axis=1),
        helper.make_node("ReduceMax", ["probability", "classes"], ["largest"], keepdims=0),
        helper.make_node("Mul", ["largest", "most"], ["scaled"]),
        helper.make_node("Round", ["scaled"], ["rounded"]),
        helper.make_node("Cast", ["rounded"], ["confidence"], to=TensorProto.UINT8),
    ]
    inputs = [
        helper.make_tensor_value_info("image", TensorProto.UINT8, ["B", 3, *CANVAS]),
        helper.make_tensor_value_info("adjustment", TensorProto.FLOAT, ["B", len(CLASSES)]),
    ]
    outputs = [
        helper.make_tensor_value_info("class_map", TensorProto.UINT8, ["B", *CANVAS]),
        helper.make_tensor_value_info("confidence", TensorProto.UINT8, ["B", *CANVAS]),
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", len(CLASSES), *CELLS]),
    ]
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


def write_segmentation_export(folder: Path, version: int = 1, scale: float = 20.0, miou: float = 0.5) -> Manifest:
    """Write an export folder of task segmentation, with golden requests computed by ONNX Runtime."""
    import onnxruntime

    folder.mkdir(parents=True)
    write_graph(folder / STUDENT_NAME, scale)
    (folder / "model_card.md").write_text("# A tiny segmentation network\n")
    (folder / GOLDEN_NAME).write_text("[]")
    manifest = Manifest(
        version=version, classes=CLASSES, counts=COUNTS, log_prior=log_class_prior(COUNTS).tolist(),
        image={"size": CANVAS[0], "resize_to": CANVAS[0], "room": ROOM}, feature_dim=1, tau_s=0.05, strength=0.0, top_k=2,
        max_batch_size=4, params_sha256="0" * 64, data_sha256="0" * 64, code_revision="none", versions={},
        metrics={"balanced": {"miou": miou}},
        files=dict.fromkeys((STUDENT_NAME, GOLDEN_NAME, "model_card.md"), "0" * 64), runtime=runtime_sha256(SEGMENTER),
        segmentation=SegmentationFormat(height=CANVAS[0], width=CANVAS[1], fill=(120, 120, 120), cells=CELLS),
    )  # fmt: skip
    session = onnxruntime.InferenceSession(str(folder / STUDENT_NAME), providers=["CPUExecutionProvider"])
    golden = []
    for image, strength in ((street(), 0.0), (street(20, 8), 1.0)):
        request = {"image": base64.b64encode(image).decode(), "strength": strength}
        call = StudentCall(manifest, Golden(**request, index=[0], probability=[1.0]))
        index, probability = call.answer(session.run([call.output], call.inputs)[0][0])
        golden.append({**request, "index": index[: manifest.top_k], "probability": probability[: manifest.top_k]})
    (folder / GOLDEN_NAME).write_text(json.dumps(golden))
    manifest = manifest.model_copy(update={"files": {name: sha256_of(folder / name) for name in manifest.files}})
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json())
    return manifest


@contextmanager
def segmentation_server(folder: Path) -> Iterator[TritonServer]:
    """Run a server of a tiny release of task segmentation. folder: an empty folder for its files."""
    write_segmentation_export(folder / "export")
    root = write_repository(folder / "export", folder / "repository")
    ports = dict.fromkeys(("http_port", "grpc_port", "metrics_port"), 0)
    started = TritonServer(root, **ports, log=folder / "triton.log").start()
    try:
        yield started
    finally:
        started.stop()
