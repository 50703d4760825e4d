"""Export the served graph with a float16 backbone; normalisation, classifier and logit adjustment stay float32.

ONNX Runtime's converter gets only the backbone. With the whole graph it would round between any two nodes that it must
leave in float32, and the logits too: a cosine rounded to float16 gives an error of 0.01 in a logit.
"""

from __future__ import annotations

import graphlib
import os
import sys
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from onnx import TensorProto, compose, helper, numpy_helper, shape_inference
from torch import Tensor, nn

from pipeline.onnx_export.graph import TRACED_BATCH, ServedStudent, example_image, trace
from pipeline.shared.errors import StageError

FLOAT16_MAX = 65504.0  # largest finite float16 number
# Operators that stay float32, as in training: norms and softmax, and the length of a feature, whose sum of squares can be
# out of range. A batch norm after a convolution is folded into it.
FLOAT32_OPERATORS = [
    "BatchNormalization",
    "GroupNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "LogSoftmax",
    "RMSNormalization",
    "ReduceL2",
    "Softmax",
]
REMEDY = "keep export.precision at float32"


@dataclass(frozen=True)
class Float16Graph:
    """The float16 graph, and a float32 graph that emulates its rounding.

    served: the ONNX file. rounding: the same graph in float32, with each value of the backbone rounded to float16. On a
    CPU, ONNX Runtime computes a float16 graph in float32 without intermediate rounding; only `rounding` shows there the
    result of a GPU, and whether a value exceeds the range of float16. Its third output `magnitude` [V] is the largest
    absolute value, before rounding, of each of `values`.
    """

    served: bytes
    rounding: bytes
    values: list[str]

    def check_magnitude(self, magnitude: np.ndarray) -> None:
        """Raise StageError with the name of the first backbone value outside float16's range; magnitude: [V]."""
        beyond = np.flatnonzero(~(magnitude <= FLOAT16_MAX))
        if len(beyond):
            raise StageError(
                f"{self.values[beyond[0]]} reaches {magnitude[beyond[0]]:.3g} in the backbone, beyond float16's largest "
                f"number {FLOAT16_MAX:g}; {REMEDY}; nothing was exported"
            )


class _Normalisation(nn.Module):
    def __init__(self, served: ServedStudent) -> None:
        super().__init__()
        self.served = served

    def forward(self, image: Tensor) -> Tensor:
        return self.served.normalise(image)


class _Head(_Normalisation):
    def forward(self, features: Tensor, strength: Tensor) -> tuple[Tensor, Tensor]:
        return self.served.head(features, strength)


def to_float16(served: ServedStudent, size: int, opset: int) -> Float16Graph:
    """Export the graph of `to_onnx` with the backbone in float16; inputs and outputs keep names and types.

    Raises StageError with the name of a weight that is outside float16's range.
    """
    image = example_image(size)
    with torch.inference_mode():
        pixels = served.normalise(image)
        features = torch.zeros_like(served.backbone(pixels))
    strength = torch.zeros(TRACED_BATCH, 1)
    before = trace(_Normalisation(served), {"image": image}, ["pixels"], opset)
    backbone = trace(served.backbone, {"pixels": torch.zeros_like(pixels)}, ["features"], opset)
    after = trace(_Head(served), {"features": features, "strength": strength}, ["logits", "feature"], opset)
    _check_weight_range(backbone)
    backbone = shape_inference.infer_shapes(backbone)
    half = convert_to_float16(backbone)
    rounding, values = _emulate_rounding(backbone, half)
    return Float16Graph(_merge(before, half, after), _merge(before, rounding, after), values)


def _check_weight_range(backbone: onnx.ModelProto) -> None:
    """Raise StageError for a weight outside float16's range; the converter would clip it without a warning."""
    for tensor in backbone.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor)
            largest = float(np.abs(values).max(initial=0.0))
            if not largest <= FLOAT16_MAX:
                raise StageError(
                    f"weight {tensor.name} of the backbone has the value {largest:.3g}, beyond float16's largest number "
                    f"{FLOAT16_MAX:g}; {REMEDY}; nothing was exported"
                )


def convert_to_float16(backbone: onnx.ModelProto) -> onnx.ModelProto:
    """Convert a graph to float16, with a cast at its input and at its output."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read at the first import; else onnxruntime writes a telemetry file
    path = list(sys.path)
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    sys.path[:] = path  # onnxruntime.transformers adds its folder, which has modules named `benchmark` and the like
    copy = onnx.ModelProto()
    copy.CopyFrom(backbone)
    blocked = [*DEFAULT_OP_BLOCK_LIST, *FLOAT32_OPERATORS]
    half = convert_float_to_float16(copy, keep_io_types=True, disable_shape_infer=True, op_block_list=blocked)
    del half.graph.value_info[:]  # the converter leaves some entries with the old type
    _sort_nodes(half.graph)
    return half


def _sort_nodes(graph: onnx.GraphProto) -> None:
    """Sort nodes topologically, as ONNX requires; the converter appends its casts at the end."""
    producer = {name: index for index, node in enumerate(graph.node) for name in node.output}
    inputs = {index: {producer[n] for n in node.input if n in producer} for index, node in enumerate(graph.node)}
    _replace_nodes(graph, [graph.node[index] for index in graphlib.TopologicalSorter(inputs).static_order()])


def _replace_nodes(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def _emulate_rounding(backbone: onnx.ModelProto, half: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """Make the float32 backbone with float16 weights in which each value is rounded; returns also the values' names."""
    model = onnx.ModelProto()
    model.CopyFrom(backbone)
    graph = model.graph
    weights = {tensor.name: tensor for tensor in half.graph.initializer if tensor.data_type == TensorProto.FLOAT16}
    for tensor in graph.initializer:
        if tensor.name in weights and tensor.data_type == TensorProto.FLOAT:
            rounded = numpy_helper.to_array(weights[tensor.name]).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
    typed = [*graph.value_info, *graph.output]
    floats = {value.name for value in typed if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    nodes = [*_round_nodes("pixels", "pixels rounded")]
    values: list[str] = []
    for node in graph.node:
        node.input[:] = ["pixels rounded" if name == "pixels" else name for name in node.input]
        nodes.append(node)
        for index, name in enumerate(node.output):
            if name in floats:
                node.output[index] = f"{name} exact"
                nodes += _round_nodes(f"{name} exact", name) + _magnitude_nodes(f"{name} exact")
                values.append(f"{node.op_type} {name}")
    sizes = [name for node in nodes for name in node.output if name.endswith(" size")]
    nodes.append(helper.make_node("Concat", sizes, ["magnitude"], axis=0))
    _replace_nodes(graph, nodes)
    graph.output.append(helper.make_tensor_value_info("magnitude", TensorProto.FLOAT, [len(values)]))
    graph.initializer.append(numpy_helper.from_array(np.array([1], dtype=np.int64), "one number"))
    return model, values


def _round_nodes(name: str, result: str) -> list[onnx.NodeProto]:
    """Cast nodes float32 → float16 → float32; ONNX Runtime does not remove such a pair between float32 nodes."""
    return [
        helper.make_node("Cast", [name], [f"{name} half"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", [f"{name} half"], [result], to=TensorProto.FLOAT),
    ]


def _magnitude_nodes(name: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Abs", [name], [f"{name} absolute"]),
        helper.make_node("ReduceMax", [f"{name} absolute"], [f"{name} largest"], keepdims=0),
        helper.make_node("Reshape", [f"{name} largest", "one number"], [f"{name} size"]),
    ]


def _merge(before: onnx.ModelProto, backbone: onnx.ModelProto, after: onnx.ModelProto) -> bytes:
    """Merge three graphs into one; inputs and outputs keep their names, inner names get a prefix."""
    parts = [
        compose.add_prefix(model, f"{name}/", rename_inputs=False, rename_outputs=False)
        for name, model in (("normalisation", before), ("backbone", backbone), ("answer", after))
    ]
    merged = compose.merge_models(parts[0], parts[1], [("pixels", "pixels")])
    merged = compose.merge_models(merged, parts[2], [("features", "features")])
    merged.graph.name, merged.producer_name = "student", "tailor"
    del merged.opset_import[1:]  # one identical entry per merged part
    return merged.SerializeToString()
