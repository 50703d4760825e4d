"""Sections `evaluate`, `export`, `serving` and `gate`: what becomes of a trained student."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.params.section import Number, Positive, PositiveInt, Section, Share


class EvaluateParams(Section):
    """Evaluation: bins of the calibration error, k of top-k accuracy, test images kept as samples.

    champion: folder of the run that serves, which the report then shows beside teacher and student; null for none.
    """

    ece_bins: Annotated[int, Field(ge=2, le=1000)]
    top_k: PositiveInt
    samples: PositiveInt
    champion: str | None = None


class HalfParams(Section):
    """What float16 may change. tolerance: of a cosine (a logit as a share of its scale 1/tau_s) and of a unit feature.

    agreement: least share of held-out images whose best class stays the same. Measured with every value of the backbone
    rounded to float16, as a GPU stores it.
    """

    tolerance: Positive = 0.002
    agreement: Share = 0.98


class ExportParams(Section):
    """ONNX export: opset, largest batch, how far ONNX Runtime's logits may be from PyTorch's (absolute).

    precision: of the backbone; float16 is for GPUs, and has the bounds of section half in the place of tolerance.
    """

    opset: Annotated[int, Field(ge=18, le=20)]
    max_batch_size: Annotated[int, Field(ge=2, le=1024)]
    precision: Literal["float32", "float16"] = "float32"
    tolerance: Positive
    half: HalfParams = HalfParams()
    golden: PositiveInt


class ServingParams(Section):
    """The served classifier: adjustment strength when a request names none, answers per image.

    image_pixels, request_pixels: decoded for an image and for all images of a request; a large JPEG counts less.
    """

    strength: Annotated[Number, Field(allow_inf_nan=False)]
    top_k: PositiveInt
    image_pixels: PositiveInt = 16_000_000
    request_pixels: PositiveInt = 25_000_000


class GateRule(Section):
    """When a measure refuses the challenger; margin is how much worse it may be, as a share (0.01 is one point).

    beyond_noise: worse by more than the margin, with interval and McNemar's test agreeing that it is not chance.
    estimate: the difference itself exceeds the margin. proven: unless the whole interval is within the margin. none: never.
    """

    rule: Literal["beyond_noise", "estimate", "proven", "none"]
    margin: Share = 0.0


class GateParams(Section):
    """Whether a challenger takes the champion's place: a rule per measure, and the floor of the first model.

    all: mean over classes, weighted by target_prior. floor: least balanced accuracy where there is no champion.
    latency_ratio: largest challenger / champion; null for none.
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
