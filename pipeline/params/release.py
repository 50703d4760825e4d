"""Sections `evaluate`, `export`, `serving` and `gate`: what becomes of a trained student."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.params.section import Number, Positive, PositiveInt, Section, Share


class EvaluateParams(Section):
    """Evaluation: bins of the calibration error, k of top-k accuracy, test images kept as samples."""

    ece_bins: Annotated[int, Field(ge=2, le=1000)]
    top_k: PositiveInt
    samples: PositiveInt


class ExportParams(Section):
    """ONNX export: opset, largest batch, how far ONNX Runtime's logits may be from PyTorch's (absolute)."""

    opset: Annotated[int, Field(ge=18, le=20)]
    max_batch_size: Annotated[int, Field(ge=2, le=1024)]
    tolerance: Positive
    golden: PositiveInt


class ServingParams(Section):
    """Defaults of the served classifier: adjustment strength when a request names none, answers per image."""

    strength: Annotated[Number, Field(allow_inf_nan=False)]
    top_k: PositiveInt


class GateRule(Section):
    """When a measure refuses the challenger; margin is how much worse it may be, as a share (0.01 is one point).

    beyond_noise: worse by more than the margin, with interval and McNemar's test agreeing that it is not chance.
    estimate: the difference itself exceeds the margin. proven: unless the whole interval is within the margin. none: never.
    """

    rule: Literal["beyond_noise", "estimate", "proven", "none"]
    margin: Share = 0.0


class GateParams(Section):
    """Whether a challenger takes the champion's place: a rule per measure, and the floor of the first model.

    floor: least balanced accuracy where there is no champion. latency_ratio: largest challenger / champion; null for none.
    """

    target_prior: Literal["balanced", "train"] = "balanced"
    confidence: Annotated[Number, Field(gt=0.5, lt=1)] = 0.95
    resamples: Annotated[int, Field(ge=100, le=100_000)] = 2000
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    floor: Share = 0.3
    all: GateRule = GateRule(rule="beyond_noise")
    many: GateRule = GateRule(rule="none")
    medium: GateRule = GateRule(rule="none")
    few: GateRule = GateRule(rule="estimate")
    ece: GateRule = GateRule(rule="none")
    latency_ratio: Positive | None = None
