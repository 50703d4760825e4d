"""Export the served graph to ONNX: uint8 images and a strength in, adjusted logits and the feature out."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.networks.adapters import input_and_feature
from models.networks.cosine_classifier import ImageClassifier, LinearHead, unit_parts
from models.prior import adjust_logits

if TYPE_CHECKING:
    import onnx

TRACED_BATCH = 3
LARGEST_IR = 10


class ServedStudent(nn.Module):
    """Student with pixel normalisation and logit adjustment in one module, with constants folded.

    The pixel normalisation is one multiply and add; the classifier is one matrix product (ImageClassifier.folded).
    shift: [C], Prior.balanced_shift of the network, so that strength 0 is the balanced prior for any adjustment in the
    loss. If the student has a memory or the head of a second stage, that is part of the graph, in float32. with_map: the
    third output is the map of features of which the feature is the mean (Backbone.with_map).
    """

    scale: Tensor
    shift: Tensor
    class_matrix: Tensor | None
    class_bias: Tensor | None
    log_prior: Tensor

    def __init__(
        self,
        model: ImageClassifier,
        mean: list[float],
        std: list[float],
        log_prior: list[float],
        shift: list[float] | None = None,
        with_map: bool = False,
    ) -> None:
        super().__init__()
        self.with_map = with_map
        self.backbone, self.memory, self.feature_dim = model.backbone, model.memory, model.feature_dim
        self.refitted = model.classifier if model.cosine and isinstance(model.classifier, LinearHead) else None
        spread, centre = torch.tensor(std).view(3, 1, 1), torch.tensor(mean).view(3, 1, 1)
        self.register_buffer("scale", 1 / (255 * spread))
        self.register_buffer("shift", -centre / spread)
        folded = model.folded()
        self.parts = folded.parts if folded else 1
        self.register_buffer("class_matrix", folded.matrix if folded else None)
        # Most recipes need no shift; their graph has no bias.
        bias = torch.tensor(shift) if shift is not None and any(shift) else None
        if folded and folded.bias is not None:
            bias = folded.bias if bias is None else folded.bias + bias
        self.register_buffer("class_bias", bias)
        self.register_buffer("log_prior", torch.tensor(log_prior))

    def forward(self, image: Tensor, strength: Tensor) -> tuple[Tensor, ...]:
        """Compute logits [B,C] = cos/tau_s + shift + memory + strength·log_prior, and the unit feature [B,D].

        Of another classifier, and after a second stage, its logits stand in the place of cos/tau_s. image: uint8 [B,3,H,W];
        strength: float32 [B,1].
        """
        if self.with_map:
            outputs, maps = self.backbone.with_map(self.normalise(image))
            return *self.head(outputs, strength), maps
        return self.head(self.backbone(self.normalise(image)), strength)

    def normalise(self, image: Tensor) -> Tensor:
        """Normalise an image uint8 [B,3,H,W] to the backbone's input, float32 [B,3,H,W]."""
        return image.float() * self.scale + self.shift

    def head(self, outputs: Tensor, strength: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits [B,C] and the unit feature [B,D] from the backbone's output and strength [B,1].

        outputs: features [B,D], or [B,2D] with a memory and an adapter; see ImageClassifier.
        """
        if self.refitted is not None:
            feature, logits = F.normalize(outputs, dim=1), self.refitted(outputs)
            if self.class_bias is not None:
                logits = logits + self.class_bias
        elif self.memory is None:
            feature = F.normalize(outputs, dim=1)
            logits = self._classified(outputs, feature)
        else:
            before, features = input_and_feature(outputs, self.feature_dim)
            feature = F.normalize(features, dim=1)
            logits = self.memory(before)
            if self.class_matrix is not None:
                logits = logits + self._classified(features, feature)
        return adjust_logits(logits, self.log_prior, strength), feature

    def _classified(self, features: Tensor, unit: Tensor) -> Tensor:
        scaled = unit if self.parts == 1 else unit_parts(features, self.parts)
        return F.linear(scaled, self.class_matrix, self.class_bias)


def to_onnx(served: ServedStudent, size: int, opset: int) -> bytes:
    """Export the graph as one ONNX file with a dynamic batch size.

    Opset at most 20 and IR version at most 10, because older Triton images do not load newer ones.
    """
    example = {"image": example_image(size), "strength": torch.zeros(TRACED_BATCH, 1)}
    outputs = ["logits", "feature", *(["feature_map"] if served.with_map else [])]
    return trace(served, example, outputs, opset).SerializeToString()


def example_image(size: int) -> Tensor:
    """Example images for tracing; more than one, because torch.export would specialise the graph to a batch of 1."""
    return torch.zeros(TRACED_BATCH, 3, size, size, dtype=torch.uint8)


def trace(network: nn.Module, inputs: dict[str, Tensor], outputs: list[str], opset: int) -> onnx.ModelProto:
    """Export a network as an ONNX graph with named inputs [B,...] and a dynamic batch size."""
    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings():
        # The exporter emits deprecation warnings about its internals on every call.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network, tuple(inputs.values()), input_names=list(inputs), output_names=outputs, opset_version=opset,
            dynamic_shapes=tuple({0: batch} for _ in inputs), dynamo=True, verbose=False,
        )  # fmt: skip
    graph = program.model_proto
    graph.ir_version = min(graph.ir_version, LARGEST_IR)
    for part in (graph.graph, *graph.graph.node, *graph.graph.value_info, *graph.graph.input, *graph.graph.output):
        # Stack traces of the exporter would leak local paths, and the file would differ between machines.
        del part.metadata_props[:]
    return graph
