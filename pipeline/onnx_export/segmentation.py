"""Export of task segmentation: one ONNX graph from the canvas to class map, confidence and logits; parity; golden requests."""

from __future__ import annotations

import base64
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from models.prior import RULED_OUT, adjust_logits
from models.segmentation.network import SegmentationModel, upsample
from pipeline.data.class_prior import Prior
from pipeline.data.dataset import normalise
from pipeline.onnx_export.graph import TRACED_BATCH, trace
from pipeline.params import ExportParams, ImageParams, Params
from pipeline.segmentation.dataset import LabelMapSplit
from pipeline.shared.errors import StageError
from serving.repository.manifest import GOLDEN_TOLERANCE, Golden

if TYPE_CHECKING:
    import onnxruntime

OUTPUTS = ("class_map", "confidence", "logits")
COMPARED = 4  # images, and as many of noise, on which the graph is compared with PyTorch


class ServedSegmenter(nn.Module):
    """Segmentation network with pixel normalisation, logit adjustment and class map in one module.

    The adjustment is added at the resolution of the cells, where it costs 1/stride² of what it would cost at the pixels:
    the weights of the interpolation sum to 1, so that the result is the same.
    """

    def __init__(
        self, model: SegmentationModel, mean: list[float], std: list[float], canvas: list[int], shift: list[float]
    ) -> None:
        super().__init__()
        self.model, self.canvas = model, canvas
        spread, centre = torch.tensor(std).view(3, 1, 1), torch.tensor(mean).view(3, 1, 1)
        self.register_buffer("scale", 1 / (255 * spread))
        self.register_buffer("offset", -centre / spread)
        self.register_buffer("balance", torch.tensor(shift, dtype=torch.float32)[:, None, None])

    def forward(self, image: Tensor, adjustment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """image uint8 [B,3,H,W], adjustment float32 [B,C] → class_map uint8 [B,H,W], confidence uint8 [B,H,W], logits.

        adjustment: what is added to the balanced logits, strength * log_prior or the log of a target prior. confidence:
        probability of the class, in 255ths. logits: float32 [B,C,h,w], adjusted, one per cell.
        """
        logits = self.model(image.float() * self.scale + self.offset).logits + self.balance
        adjusted = adjust_logits(logits, adjustment[:, :, None, None], 1.0)
        full = upsample(adjusted, *self.canvas)
        largest = full.amax(1)
        confidence = 1 / (full - largest[:, None]).exp().sum(1)
        return full.argmax(1).to(torch.uint8), (255 * confidence).round().to(torch.uint8), adjusted


def to_onnx(served: ServedSegmenter, classes: int, opset: int) -> bytes:
    """Export the graph as one ONNX file with a dynamic batch size."""
    example = {
        "image": torch.zeros(TRACED_BATCH, 3, *served.canvas, dtype=torch.uint8),
        "adjustment": torch.zeros(TRACED_BATCH, classes),
    }
    return trace(served, example, list(OUTPUTS), opset).SerializeToString()


def check_parity(
    session: onnxruntime.InferenceSession,
    model: SegmentationModel,
    examples: LabelMapSplit,
    image: ImageParams,
    log_prior: np.ndarray,
    shift: np.ndarray,
    export: ExportParams,
    seed: int,
) -> float:
    """Compare the graph with PyTorch on images and noise; returns the largest absolute logit difference.

    Strengths -0.5 to 2.5 and a target prior that rules out a class. Raises StageError if a logit differs by more than
    export.tolerance or is not finite, or if the class of a pixel differs although its logit is larger than all others by
    more than twice the tolerance.
    """
    generator, canvas = np.random.default_rng(seed), examples.canvas
    chosen = generator.permutation(len(examples))[:COMPARED].tolist()
    real = np.stack([examples.read(index)[0] for index in chosen])
    pixels = np.concatenate([real, generator.integers(0, 256, real.shape, dtype=np.uint8)])
    rows = [strength * log_prior for strength in generator.choice([0.0, 1.0, -0.5, 2.5], len(pixels) - 1)]
    ruled_out = np.zeros(len(log_prior))
    ruled_out[0] = RULED_OUT
    adjustment = np.stack([*rows, ruled_out]).astype(np.float32)
    with torch.inference_mode():
        balanced = (
            model.eval()(normalise(torch.from_numpy(pixels), image)).logits
            + torch.from_numpy(shift).float()[:, None, None]
        )
        expected = balanced + torch.from_numpy(adjustment)[:, :, None, None]
        full = upsample(expected, *canvas)
    class_map, confidence, logits = session.run(list(OUTPUTS), {"image": pixels, "adjustment": adjustment})
    ordinary = adjustment > RULED_OUT / 2
    gap = float(np.abs(logits - expected.numpy())[ordinary].max())
    best = full.topk(2, dim=1).values
    clear = (best[:, 0] - best[:, 1] > 2 * export.tolerance).numpy()
    wrong = int((class_map != full.argmax(1).numpy())[clear].sum())
    probability = full.double().softmax(1).amax(1).numpy()
    far = float(np.abs(confidence / 255 - probability).max())
    if not gap <= export.tolerance or wrong or not far <= 0.5 / 255 + export.tolerance:
        raise StageError(
            f"ONNX Runtime differs from PyTorch by {gap:.2e} (logits), in the class of {wrong} pixels, and by {far:.2e} "
            f"(confidence), above export.tolerance = {export.tolerance:g}; nothing was exported"
        )
    return gap


def blank(canvas: list[int], classes: int) -> dict[str, np.ndarray]:
    """Input of one black image without any adjustment."""
    return {"image": np.zeros((1, 3, *canvas), np.uint8), "adjustment": np.zeros((1, classes), np.float32)}


def model_card(params: Params, prior: Prior, metrics: dict[str, Any]) -> str:
    """A short model card in Markdown: network, data, metrics on the test split."""
    canvas = "x".join(map(str, params.segmentation.canvas)) if params.segmentation else ""
    lines = [
        "# Segmentation model",
        "",
        f"{params.student.backbone}, canvas {canvas} (height x width), {len(prior.classes)} classes, seed {params.seed}.",
        f"Data: {params.data.source}, {sum(prior.counts):,} labelled training pixels; the rarest class has {min(prior.p):.3%}.",
        "",
        "| target prior | mIoU | mAcc | aAcc |",
        "|---|--:|--:|--:|",
    ]
    for name, values in metrics.items():
        cells = [values[key] for key in ("miou", "macc", "aacc")]
        lines.append(f"| {name} | {' | '.join('n/a' if cell is None else f'{cell:.1%}' for cell in cells)} |")
    lines += ["", "Test split, images at their own size; areas summed over the split. No other domain was tested."]
    return "\n".join(lines) + "\n"


def golden_requests(
    session: onnxruntime.InferenceSession,
    examples: LabelMapSplit,
    count: int,
    log_prior: np.ndarray,
    best: int,
    seed: int,
) -> list[Golden]:
    """Golden requests: images at strength 0 and 1 alternately, with the largest classes of the class map and their shares.

    index: the `best` classes by their share of the image's pixels; probability: these shares.
    """
    golden = []
    for number, example in enumerate(islice(np.random.default_rng(seed).permutation(len(examples)).tolist(), count)):
        strength = float(number % 2)
        canvas, (height, width), _ = examples.read(example)
        adjustment = (strength * log_prior).astype(np.float32)[None]
        class_map = session.run(["class_map"], {"image": canvas[None], "adjustment": adjustment})[0][0, :height, :width]
        shares = np.bincount(class_map.ravel(), minlength=len(log_prior)) / class_map.size
        index = np.argsort(-shares, kind="stable")[:best]
        golden.append(
            Golden(
                image=base64.b64encode(examples.encoded(example)).decode(), strength=strength, index=index.tolist(),
                probability=shares[index].tolist(), tolerance=GOLDEN_TOLERANCE,
            )
        )  # fmt: skip
    return golden
