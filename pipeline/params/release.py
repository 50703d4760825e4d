"""Sections `evaluate`, `export`, `serving` and `gate` of params.yaml."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from pipeline.params.section import Number, Positive, PositiveInt, Section, Share

Cost = Annotated[Number, Field(ge=0, allow_inf_nan=False)]
Costs = Annotated[
    Annotated[dict[str, Cost], Tag(":names")] | Annotated[list[list[Cost]], Tag(":matrix")],
    Discriminator(
        lambda value: {dict: ":names", list: ":matrix"}.get(type(value)),
        custom_error_type="costs", custom_error_message="expected costs by class name, or a list of rows",
    ),
]  # fmt: skip


class EvaluateParams(Section):
    """Evaluation. ece_bins: of the calibration error. top_k: k of top-k accuracy. samples: test images kept as samples.

    champion: folder of the champion's run, which the report shows beside teacher and student; null for none.
    """

    ece_bins: Annotated[int, Field(ge=2, le=1000)]
    top_k: PositiveInt
    samples: PositiveInt
    champion: str | None = None


class HalfParams(Section):
    """Bounds for float16. tolerance: of a cosine (a logit times tau_s) and of a unit feature value.

    agreement: smallest allowed share of held-out images with an unchanged best class. Both are measured with each value
    of the backbone rounded to float16, as a GPU stores it.
    """

    tolerance: Positive = 0.002
    agreement: Share = 0.98


class ExportParams(Section):
    """ONNX export: opset, largest batch, number of golden requests.

    tolerance: largest absolute difference of a logit between ONNX Runtime and PyTorch. precision: of the backbone;
    float16 is for GPUs and uses the bounds of section half instead of tolerance.
    """

    opset: Annotated[int, Field(ge=18, le=20)]
    max_batch_size: Annotated[int, Field(ge=2, le=1024)]
    precision: Literal["float32", "float16"] = "float32"
    tolerance: Positive
    half: HalfParams = HalfParams()
    golden: PositiveInt


class ExplainParams(Section):
    """Reasons of answers. images: training images in the feature index of a release; 0: none. thumbnails: longer side in pixels
    of their small copies in the index; null: no copies. map: whether the graph has an output for class-activation maps.
    """

    images: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    thumbnails: Annotated[int, Field(ge=16, le=256)] | None = None
    map: bool = False


class ServingParams(Section):
    """The served classifier. strength: default strength of the logit adjustment. top_k: classes in a response.

    calibration: whether the server divides the balanced logits by a temperature that evaluation fits on validation images.
    coverage: default coverage of prediction sets; null: only where a request names one. costs: cost of missing each class by
    its name, 1 for the others, or a matrix with a row for each true class; null: 1 for every wrong class. ask: price of
    asking a person; null: never. With costs or ask every response has a decision. false_alarms: rate at which images of known
    classes are called unknown; null: only where a request names one. level: probability that the node of data.taxonomy in
    every response reaches; null: only where a request names one. explain: what a request with `explain` is answered with.

    image_pixels, request_pixels: limits of decoded pixels for one image and for all images of a request; a large JPEG
    counts less. trusted_keys: public keys that sign releases, each a PEM file or base64; other releases are neither
    promoted nor served. Empty: signatures are not checked. serving/repository/signing_keys.py reads it.
    """

    strength: Annotated[Number, Field(allow_inf_nan=False)]
    top_k: PositiveInt
    calibration: Literal["temperature", "none"] = "temperature"
    coverage: Annotated[Number, Field(gt=0, lt=1)] | None = None
    costs: Costs | None = None
    ask: Cost | None = None
    false_alarms: Annotated[Number, Field(gt=0, lt=1)] | None = None
    level: Annotated[Number, Field(gt=0, le=1)] | None = None
    explain: ExplainParams = ExplainParams()
    image_pixels: PositiveInt = 16_000_000
    request_pixels: PositiveInt = 25_000_000
    trusted_keys: list[Annotated[str, Field(min_length=1)]] = []


class GateRule(Section):
    """Rule by which a measure refuses the challenger. margin: allowed loss, as a share (0.01 is one point).

    beyond_noise: refuse if the loss exceeds the margin and both the interval and McNemar's test show that it is not
    chance. estimate: refuse if the difference exceeds the margin. proven: refuse unless the whole interval is within
    the margin. none: never refuse.
    """

    rule: Literal["beyond_noise", "estimate", "proven", "none"]
    margin: Share = 0.0


class GateParams(Section):
    """Promotion gate: a rule per measure, and the floor for the first model.

    all: mean over classes, weighted by target_prior. coverage: how far the prediction sets of the release stay below the wanted
    coverage. ece, nll, coverage: over all test images and over each shot group that has enough of them. floor: least balanced
    accuracy if there is no champion. latency_ratio: largest allowed latency of challenger / champion; null for no limit.
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
    nll: GateRule = GateRule(rule="none")
    coverage: GateRule = GateRule(rule="none")
    latency_ratio: Positive | None = None
