"""params.yaml, the recipe of a run, as typed and validated values."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import ParamsError

PARAMS_FILE = Path("params.yaml")

EXPONENT_FORM = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def _exponent_form(value: Any) -> Any:
    """YAML's reading of `1e-4` (text: YAML 1.1 wants a dot) as the number that the user meant."""
    return float(value) if isinstance(value, str) and EXPONENT_FORM.fullmatch(value) else value


Number = Annotated[float, BeforeValidator(_exponent_form)]
PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[Number, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[Number, Field(ge=0, le=1)]


class Section(BaseModel):
    """Base of every section: unknown keys refused, values frozen, no silent conversion of text to numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TableParams(Section):
    """Columns and files of the `table` source; paths are relative to data.location. A null split is held out of train.

    A split is a file, a glob pattern, a folder of Parquet shards, or a list of these.
    """

    train: str | list[str] = "train.parquet"
    validation: str | list[str] | None = None
    test: str | list[str] | None = None
    image: str | None = "image"
    path: str | None = None
    label: str = "label"
    id: str | None = None
    class_names: list[str] | None = None

    @model_validator(mode="after")
    def _one_way_to_the_image(self) -> TableParams:
        if (self.image is None) == (self.path is None):
            raise ValueError("set exactly one of image (a column of encoded bytes) and path (a column of file paths)")
        return self


class ListParams(Section):
    """List files of imagenet_lt, places_lt and inaturalist2018, where they are not in data.location by their own names."""

    train: str | None = None
    validation: str | None = None
    test: str | None = None


class DataParams(Section):
    """Where the images come from, how long the tail is made, and what is held out."""

    source: Literal["digits", "folder", "table", "cifar10", "cifar100", "imagenet_lt", "places_lt", "inaturalist2018"]
    location: str
    download: bool = False
    lists: ListParams = ListParams()
    table: TableParams = TableParams()
    on_bad_image: Literal["fail", "skip"] = "fail"
    profile: Literal["natural", "exponential", "pareto", "step"]
    imbalance_factor: Annotated[Number, Field(ge=1, allow_inf_nan=False)]
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    test_per_class: PositiveInt
    validation_per_class: Count
    validation_share: Share


class ImageParams(Section):
    """The network's input: shorter side to resize_to, centre crop of size (pixels), then (x/255 - mean) / std per channel."""

    size: Annotated[int, Field(ge=8, le=1024)]
    resize_to: Annotated[int, Field(ge=8, le=2048)]
    mean: Annotated[list[Share], Field(min_length=3, max_length=3)]
    std: Annotated[list[Positive], Field(min_length=3, max_length=3)]

    @model_validator(mode="after")
    def _crop_fits(self) -> ImageParams:
        if self.resize_to < self.size:
            raise ValueError(f"resize_to is {self.resize_to}, below size {self.size}; the crop would not fit")
        return self


class PriorParams(Section):
    """Pseudo-count added to every class before the prior is taken; 0 refuses a class without training samples.

    weighting effective_number puts (1 - beta^n) / (1 - beta) in the place of n (Cui et al. 2019) in the prior of the losses.
    """

    smoothing: NonNegative
    weighting: Literal["frequency", "effective_number"] = "frequency"
    beta: Annotated[Number, Field(gt=0, lt=1)] = 0.9999


class ScheduleParams(Section):
    """Learning rate by epoch: `cosine` to nearly zero, or `steps` times `factor` at each milestone; linear warm-up first.

    `rule` says when warm-up and steps end: `paper` where they are stated, `official` an epoch later, as the authors' code.
    """

    kind: Literal["cosine", "steps"]
    rule: Literal["paper", "official"] = "paper"
    warmup_epochs: Count
    milestones: list[PositiveInt] = []
    factor: Annotated[Number, Field(gt=0, lt=1)] = 0.1

    @model_validator(mode="after")
    def _milestones_belong_to_steps(self) -> ScheduleParams:
        if self.kind == "steps" and self.milestones != sorted(set(self.milestones)):
            raise ValueError(f"milestones is {self.milestones}; expected epochs in rising order")
        if self.kind == "cosine" and self.milestones:
            raise ValueError("milestones is set but kind is cosine; expected kind: steps, or no milestones")
        return self


class AugmentParams(Section):
    """Random changes of each view, in this order: crop, flip, policy, Cutout; then the mix of the classifier view.

    `crop: pad` adds crop_padding black pixels on each side, `crop: resized` enlarges a box of crop_scale of the area.
    `contrast_policy` is that of the query and key views. randaugment, simaugment and stacked (both, with grey and
    blur before RandAugment) begin with colour jitter of strength `jitter`. simaugment always crops `resized`, and
    has no Cutout.
    """

    crop: Literal["pad", "resized"] = "pad"
    crop_padding: Count
    crop_scale: Annotated[list[Annotated[Number, Field(gt=0, le=1)]], Field(min_length=2, max_length=2)] = [0.08, 1.0]
    flip: bool
    policy: Literal["none", "autoaugment", "randaugment", "simaugment", "stacked"] = "none"
    contrast_policy: Literal["same", "none", "autoaugment", "randaugment", "simaugment", "stacked"] = "same"
    jitter: Share = 0.4
    cutout: Count
    mix: Literal["none", "cutmix", "mixup"] = "none"
    mix_alpha: Positive = 1.0

    @model_validator(mode="after")
    def _scale_rises(self) -> AugmentParams:
        if self.crop_scale[0] > self.crop_scale[1]:
            raise ValueError(f"crop_scale is {self.crop_scale}; expected the smaller share of the area first")
        return self

    @model_validator(mode="after")
    def _some_view_takes_cutout(self) -> AugmentParams:
        if self.cutout and self.policy == "simaugment" and self.contrast_policy in ("same", "simaugment"):
            raise ValueError(
                f"cutout is {self.cutout}, but every view is simaugment, which has no Cutout; set cutout: 0"
            )
        return self


class PretrainedParams(Section):
    """A local file of weights (safetensors, under the names of the backbone's library) and its sha256, which is checked."""

    file: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class TrainingParams(Section):
    """What teacher and student training share: network, SGD, schedule, augmentation.

    adjustment: strength of the logit adjustment in L_cls; 1 is Eq. 6, 0 plain cross-entropy. ema_decay: of the average of
    weights that is evaluated and kept instead of the last step's; 0 for none. accumulate: parts in which a batch goes
    through the network, for batches that the device cannot hold. pretrained: weights that the network starts from.
    """

    backbone: str
    pretrained: PretrainedParams | None = None
    tau_s: Positive
    adjustment: NonNegative = 1.0
    ema_decay: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    epochs: PositiveInt
    batch_size: Annotated[int, Field(ge=2)]
    accumulate: PositiveInt = 1
    learning_rate: Positive
    momentum: Annotated[Number, Field(ge=0, lt=1)]
    weight_decay: NonNegative
    schedule: ScheduleParams
    augment: AugmentParams


class StudentParams(TrainingParams):
    """The student's terms: gamma·L_cls + beta·(L_GML + L_tau) + alpha·L_KD, and the class-wise queues.

    A term of weight 0 is left out of the step. contrast_encoder fills the queues: the frozen `teacher`, or a `momentum`
    copy of the student, which follows it by encoder_momentum a step; with alpha 0 no teacher then takes part.
    """

    gamma: NonNegative
    beta: NonNegative
    alpha: NonNegative
    distillation_temperature: Positive
    prior_strength: NonNegative
    contrast_encoder: Literal["teacher", "momentum"] = "teacher"
    encoder_momentum: Annotated[Number, Field(ge=0, lt=1)] = 0.999
    tau_g: Positive
    train_tau_g: bool
    queue_total: PositiveInt
    queue_minimum: PositiveInt
    projection_dim: PositiveInt

    @model_validator(mode="after")
    def _classifier_is_trained(self) -> StudentParams:
        if not (self.gamma or self.alpha):
            raise ValueError("gamma and alpha are both 0, so no term trains the classifier; set one of them above 0")
        return self


class EngineParams(Section):
    """How training runs. Nothing here changes the recipe; `precision` changes rounding, the rest not even that.

    precision: of the networks' convolutions and products; auto is bfloat16 on CUDA and float32 on the CPU. capture: a step
    as one CUDA graph, checked against the plain step before it is used. checkpoint_seconds: longest time between two
    checkpoints. checkpoint_activations: the backward pass computes each block again, which takes less memory and more
    time. tensorboard: event files under artifacts/tensorboard/ as well. side_by_side: how many of `seeds` train
    at once on the device; auto is one on the CPU, all on a GPU.
    """

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    capture: bool = True
    checkpoint_seconds: NonNegative = 60.0
    checkpoint_activations: bool = False
    tensorboard: bool = False
    side_by_side: PositiveInt | Literal["auto"] = "auto"


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


class Params(Section):
    """The whole of params.yaml."""

    seed: Annotated[int, Field(ge=0, lt=2**63)]
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
    engine: EngineParams = EngineParams()
    seeds: list[Annotated[int, Field(ge=0, lt=2**63)]] = []
    data: DataParams
    image: ImageParams
    prior: PriorParams
    teacher: TrainingParams
    student: StudentParams
    evaluate: EvaluateParams
    export: ExportParams
    serving: ServingParams
    gate: GateParams = GateParams()


def load_params(path: Path = PARAMS_FILE) -> Params:
    """Read and validate a params file. Raises ParamsError naming the file, the key, the value and what is allowed."""
    return parse_params(read_yaml(path), path)


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, refusing a key that stands twice; plain YAML takes the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node. Raises ConstructorError naming the repeated key and its line."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping. Raises ParamsError otherwise."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)  # a SafeLoader
    except OSError as error:
        raise ParamsError(f"{path}: {error.strerror}; run from the project's root or pass --params FILE") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ParamsError(f"{path}: not readable as YAML: {reason}") from None
    if not isinstance(content, dict):
        raise ParamsError(f"{path}: holds {type(content).__name__}; expected sections such as data: and student:")
    return content


def parse_params(content: dict[str, Any], path: Path) -> Params:
    """Validate the content of a params file; `path` is for the message alone."""
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        # Missing keys last: a misspelt one explains them.
        entries = sorted(error.errors(), key=lambda entry: entry["type"] == "missing")
        raise ParamsError("; ".join(_explain(path, entry) for entry in entries[:3])) from None


def _explain(path: Path, entry: Any) -> str:
    location = [str(part) for part in entry["loc"]]
    key = ".".join(location)
    if entry["type"] == "extra_forbidden":
        siblings = _keys_at(location[:-1])
        nearest = difflib.get_close_matches(location[-1], siblings, n=1, cutoff=0.5)
        prefix = ".".join(location[:-1])
        hint = (
            f"; did you mean {'.'.join(filter(None, [prefix, nearest[0]]))}?"
            if nearest
            else f"; known here: {', '.join(siblings)}"
        )
        return f"{path}: {key} is not a key{hint}"
    if entry["type"] == "missing":
        return f"{path}: {key} is missing; add it (see the file's default in the repository)"
    message = entry["msg"].removeprefix("Value error, ")
    value = "" if isinstance(entry["input"], dict | BaseModel) else f" is {entry['input']!r};"
    return f"{path}: {key}{value or ':'} {message[:1].lower()}{message[1:]}"


def _keys_at(location: list[str]) -> list[str]:
    model: Any = Params
    for part in location:
        field = model.model_fields.get(part) if hasattr(model, "model_fields") else None
        model = field.annotation if field else None
    return sorted(getattr(model, "model_fields", {}))
