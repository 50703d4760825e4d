"""The graph that is served: uint8 images and a strength in, adjusted logits and the feature out."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.networks.cosine_classifier import ImageClassifier
from models.prior import adjust_logits

if TYPE_CHECKING:
    import onnx

TRACED_BATCH = 3
LARGEST_IR = 10


class ServedStudent(nn.Module):
    """A student with its preprocessing and adjustment inside, everything constant folded ahead.

    The pixel normalisation is one multiply and add; the class matrix is normalised and divided by tau_s once, here. shift:
    [C], Prior.balanced_shift of the network, so that strength 0 answers for the balanced prior whatever the loss added.
    """

    scale: Tensor
    shift: Tensor
    class_matrix: Tensor
    class_bias: Tensor | None
    log_prior: Tensor

    def __init__(
        self,
        model: ImageClassifier,
        mean: list[float],
        std: list[float],
        log_prior: list[float],
        shift: list[float] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = model.backbone
        spread, centre = torch.tensor(std).view(3, 1, 1), torch.tensor(mean).view(3, 1, 1)
        self.register_buffer("scale", 1 / (255 * spread))
        self.register_buffer("shift", -centre / spread)
        self.register_buffer("class_matrix", F.normalize(model.classifier.weight.detach(), dim=1) / model.tau_s)
        # Most recipes need no shift; their graph then has no bias.
        self.register_buffer("class_bias", torch.tensor(shift) if shift is not None and any(shift) else None)
        self.register_buffer("log_prior", torch.tensor(log_prior))

    def forward(self, image: Tensor, strength: Tensor) -> tuple[Tensor, Tensor]:
        """image uint8 [B,3,H,W], strength float32 [B,1] → logits [B,C] = cos/tau_s + shift + strength·log_prior, unit feature
        [B,D].
        """
        return self.answer(self.backbone(self.normalise(image)), strength)

    def normalise(self, image: Tensor) -> Tensor:
        """image uint8 [B,3,H,W] → what the backbone sees, float32 [B,3,H,W]."""
        return image.float() * self.scale + self.shift

    def answer(self, features: Tensor, strength: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B,D] of the backbone, strength [B,1] → logits [B,C], unit feature [B,D]."""
        feature = F.normalize(features, dim=1)
        return adjust_logits(F.linear(feature, self.class_matrix, self.class_bias), self.log_prior, strength), feature


def to_onnx(served: ServedStudent, size: int, opset: int) -> bytes:
    """The graph as one ONNX file with a dynamic batch. Opset at most 20 and IR at most 10: older Triton images refuse newer."""
    example = {"image": example_image(size), "strength": torch.zeros(TRACED_BATCH, 1)}
    return trace(served, example, ["logits", "feature"], opset).SerializeToString()


def example_image(size: int) -> Tensor:
    """An image input to trace with; a batch of 1 would be specialised into the graph, so there are more."""
    return torch.zeros(TRACED_BATCH, 3, size, size, dtype=torch.uint8)


def trace(network: nn.Module, inputs: dict[str, Tensor], outputs: list[str], opset: int) -> onnx.ModelProto:
    """A network as an ONNX graph, its inputs [B,...] by name, of any batch."""
    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings():
        # The exporter deprecates its own internals on every call; nothing in it is for our user.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network,
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=outputs,
            dynamic_shapes=tuple({0: batch} for _ in inputs),
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    graph = program.model_proto
    graph.ir_version = min(graph.ir_version, LARGEST_IR)
    for part in (graph.graph, *graph.graph.node, *graph.graph.value_info, *graph.graph.input, *graph.graph.output):
        # Stack traces of the exporting machine: they would leak its paths and make the file differ from machine to machine.
        del part.metadata_props[:]
    return graph
