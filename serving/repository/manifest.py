"""The manifest of a release (manifest.json) and its golden requests: read and check them."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from models.decisions import check_costs
from models.preprocess import preprocess
from models.prior import Floats, adjust_logits, calibrate_logits, softmax
from models.taxonomy import Taxonomy
from serving.shared.atomic import sha256_of as sha256_of
from serving.shared.errors import ServingError
from serving.shared.names import CLASSIFIER, SEGMENTER
from serving.shared.terminal import counted

MANIFEST_NAME = "manifest.json"
GOLDEN_NAME = "golden.json"
STUDENT_NAME = "student.onnx"
EXPLAIN_NAME = "explain.npz"

# Probabilities. Another ONNX Runtime version or a GPU rounds differently; a wrong graph, prior or preprocessing differs
# by far more.
GOLDEN_TOLERANCE = 2e-3


class ManifestError(ServingError, ValueError):
    """A manifest is missing, malformed or does not match its files; the message names the file."""


class ImageFormat(BaseModel):
    """Parameters of `models.preprocess`: resize the shorter side to resize_to, centre crop of `size` (pixels).

    room: a large JPEG is decoded at a reduced size, at least room * resize_to. 0 disables it, as in exports from before
    this key existed. interpolation: filter of the resize.
    """

    model_config = ConfigDict(extra="forbid")
    size: int = Field(ge=1)
    resize_to: int = Field(ge=1)
    room: int = Field(default=0, ge=0)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    def pixels(self, data: bytes) -> NDArray[np.uint8]:
        """Encoded bytes to uint8 [3, size, size], as the served classifier does. Raises ImageError."""
        return preprocess(data, self.size, self.resize_to, self.room, interpolation=self.interpolation)


class Limits(BaseModel):
    """Limits of the pixels that the classifier decodes, per image and per request.

    A large JPEG counts with the reduced size at which it is decoded.
    """

    model_config = ConfigDict(extra="forbid")
    image_pixels: int = Field(default=16_000_000, ge=1)
    request_pixels: int = Field(default=25_000_000, ge=1)


class HalfPrecision(BaseModel):
    """Difference of a float16 graph from PyTorch in float32, measured by export.

    logit: largest absolute difference of a logit. agreement: share of the images with the same best class. images:
    number of images compared.
    """

    model_config = ConfigDict(extra="forbid")
    logit: float = Field(ge=0, allow_inf_nan=False)
    agreement: float = Field(ge=0, le=1)
    images: int = Field(ge=1)


class Calibration(BaseModel):
    """Temperature by which the classifier divides balanced logits before it adds the prior.

    images, effective: number and effective number (models.sample_size) of the validation images of the fit.
    """

    model_config = ConfigDict(extra="forbid")
    temperature: float = Field(gt=0, allow_inf_nan=False)
    images: int = Field(ge=1)
    effective: float = Field(gt=0, allow_inf_nan=False)


class PredictionSets(BaseModel):
    """Validation scores from which the classifier computes prediction sets (models.decisions).

    scores: for each class, those of its validation images. interpolation: least weight of a class's own quantile. coverage: of
    requests that name none; None: they get no set.
    """

    model_config = ConfigDict(extra="forbid")
    scores: list[list[Annotated[float, Field(ge=0, le=1)]]]
    interpolation: float = Field(ge=0, le=1)
    coverage: float | None = Field(default=None, gt=0, lt=1)


class Unknown(BaseModel):
    """Familiarity of validation images by the shot group of their predicted class, to detect unknown images.

    false_alarms: rate of requests that name none; None: they get no `unknown`.
    """

    model_config = ConfigDict(extra="forbid")
    scores: dict[Literal["many", "medium", "few"], list[Annotated[float, Field(allow_inf_nan=False)]]]
    false_alarms: float | None = Field(default=None, gt=0, lt=1)


class DecisionDefaults(BaseModel):
    """Defaults of a decision: costs, one per class or a matrix (models.decisions.check_costs), and the price of a person."""

    model_config = ConfigDict(extra="forbid")
    costs: list[float] | list[list[float]] | None = None
    ask: float | None = Field(default=None, ge=0, allow_inf_nan=False)


class TaxonomyTree(BaseModel):
    """Taxonomy of the classes (models.taxonomy): names of the classes and then of the inner nodes, and their parents.

    level: probability that the node of an answer must reach in requests that name none; None: they get no node.
    """

    model_config = ConfigDict(extra="forbid")
    names: list[str]
    parents: list[int]
    level: float | None = Field(default=None, gt=0, le=1)


class Explain(BaseModel):
    """What a release explains its answers with, in the file explain.npz (serving/triton/explain.py).

    images: training images in the feature index. bytes: of the file, which the classifier holds in memory. thumbnails: whether
    the file has small copies of the images. map: height and width of the class-activation map; None for a release without it.
    """

    model_config = ConfigDict(extra="forbid")
    images: int = Field(ge=0)
    bytes: int = Field(ge=1)
    thumbnails: bool = False
    map: tuple[int, int] | None = None


class SegmentationFormat(BaseModel):
    """Input and output of a segmentation graph.

    height, width: of the canvas, in pixels. An image is resized to fit, keeping its ratio, and padded at the bottom and
    at the right with the colour `fill`. cells: height and width of the logits.
    """

    model_config = ConfigDict(extra="forbid")
    height: int = Field(ge=1)
    width: int = Field(ge=1)
    fill: tuple[int, int, int]
    cells: tuple[int, int]


class Manifest(BaseModel):
    """All data of a release that serving uses.

    files: names of files beside the manifest with their sha256. encoder: name, licence, source and sha256 of the
    weights of a pretrained encoder, and how it was tuned; None for a network without one. memory: rows, tau and weight of
    the memory of training features; None without one. half: set for a graph with a float16 backbone; None for float32.
    calibration, sets, decision, unknown, taxonomy, explain: None in a release without them, such as one from before these keys
    existed.
    code_revision: the git commit of the project. code_sha256: hash of the source files that wrote the release; empty in
    releases from before this key existed. segmentation: set for a release of task segmentation, whose graph returns class
    maps; its golden requests have the largest classes of the class map and their shares. runtime: sha256 of the files of
    Tailor that run inside Triton, by model/name; a server that checks signatures accepts only these. Empty in releases
    from before this key existed.
    """

    model_config = ConfigDict(extra="forbid")
    format: Literal[1] = 1
    version: int = Field(ge=1)
    classes: list[str] = Field(min_length=2)
    counts: list[int]
    log_prior: list[float]
    image: ImageFormat
    feature_dim: int = Field(ge=1)
    tau_s: float = Field(gt=0)
    strength: float = Field(allow_inf_nan=False)
    top_k: int = Field(ge=1)
    max_batch_size: int = Field(ge=1)
    files: dict[str, str]
    runtime: dict[str, str] = {}
    params_sha256: str
    data_sha256: str
    code_revision: str
    code_sha256: str = ""
    versions: dict[str, str]
    metrics: dict[str, Any]
    encoder: dict[str, str | int] | None = None
    memory: dict[str, Any] | None = None
    half: HalfPrecision | None = None
    calibration: Calibration | None = None
    sets: PredictionSets | None = None
    decision: DecisionDefaults | None = None
    unknown: Unknown | None = None
    taxonomy: TaxonomyTree | None = None
    explain: Explain | None = None
    limits: Limits = Limits()
    segmentation: SegmentationFormat | None = None

    @property
    def image_model(self) -> str:
        """The model of this release that takes encoded images."""
        return SEGMENTER if self.segmentation else CLASSIFIER

    def balanced_metric(self, name: str) -> float | None:
        """A test metric for the balanced prior, such as `nll`, or None; of task segmentation mIoUs for accuracies."""
        if self.segmentation:
            name = {"balanced_accuracy": "miou"}.get(name, f"miou_{name}")
        balanced = self.metrics.get("balanced")
        value = balanced.get(name) if isinstance(balanced, dict) else None
        return value if isinstance(value, float) else None

    @field_validator("files")
    @classmethod
    def _needed_files(cls, files: dict[str, str]) -> dict[str, str]:
        for name in (STUDENT_NAME, GOLDEN_NAME):
            if name not in files:
                raise ValueError(f"lacks {name}")
        return files

    @model_validator(mode="after")
    def _one_entry_per_class(self) -> Manifest:
        if not len(self.classes) == len(self.counts) == len(self.log_prior):
            raise ValueError("classes, counts and log_prior differ in length")
        if self.sets and len(self.sets.scores) != len(self.classes):
            raise ValueError("sets.scores and classes differ in length")
        if self.decision and self.decision.costs is not None:
            check_costs(self.decision.costs, len(self.classes))
        if self.taxonomy:
            Taxonomy(self.taxonomy.names, self.taxonomy.parents, len(self.classes))
            if self.taxonomy.names[: len(self.classes)] != self.classes:
                raise ValueError("taxonomy.names do not begin with the classes")
        if self.explain and EXPLAIN_NAME not in self.files:
            raise ValueError(f"files lacks {EXPLAIN_NAME}, which explain needs")
        if self.top_k > len(self.classes):
            raise ValueError(f"top_k is {self.top_k}, above the number of classes {len(self.classes)}")
        return self


def served_probabilities(
    logits: Any, strength: float, log_prior: Sequence[float], calibration: Calibration | None
) -> Floats:
    """Probabilities [..., C] that `classifier` returns at a strength, from `student`'s logits [..., C] at that strength."""
    if calibration is None:
        return softmax(logits)
    balanced = adjust_logits(np.asarray(logits, dtype=np.float64), np.asarray(log_prior), -strength)
    calibrated = calibrate_logits(balanced, calibration.temperature)
    return softmax(adjust_logits(calibrated, np.asarray(log_prior), strength))


class Golden(BaseModel):
    """One golden request, an encoded image (base64) and a strength, with the expected response of the classifier.

    index, probability: the expected classes and their probabilities, best first. tolerance: largest allowed difference
    of a probability; larger for a float16 graph.
    """

    model_config = ConfigDict(extra="forbid")
    image: str
    strength: float = Field(allow_inf_nan=False)
    index: list[int] = Field(min_length=1)
    probability: list[float] = Field(min_length=1)
    tolerance: float = Field(default=GOLDEN_TOLERANCE, gt=0, lt=1)

    @model_validator(mode="after")
    def _answer_is_whole(self) -> Golden:
        if len(self.index) != len(self.probability):
            raise ValueError("index and probability differ in length")
        try:
            base64.b64decode(self.image, validate=True)
        except binascii.Error:
            raise ValueError("image is not base64") from None
        return self

    def image_bytes(self) -> bytes:
        """The encoded image."""
        return base64.b64decode(self.image)

    def difference(self, index: Sequence[int], probability: Sequence[float]) -> str | None:
        """The first difference of a response from the golden one as text, or None if there is none.

        Classes whose golden probabilities are tied may be swapped.
        """
        if len(index) < len(self.index) or len(probability) < len(self.probability):
            return f"{counted(len(index), 'class')} answered, {len(self.index)} expected"
        for rank, (index_expected, probability_expected) in enumerate(zip(self.index, self.probability, strict=True)):
            if not abs(float(probability[rank]) - probability_expected) <= self.tolerance:
                return f"probability {float(probability[rank]):.4f} at rank {rank + 1}, {probability_expected:.4f} expected"
            if int(index[rank]) != index_expected and not self._tied(rank):
                return f"class {int(index[rank])} at rank {rank + 1}, class {index_expected} expected"
        return None

    def _tied(self, rank: int) -> bool:
        """Whether a neighbour in the golden response has the same probability within 2 tolerances.

        The last rank counts as tied, because the probability of the next class is not recorded.
        """
        near = [r for r in (rank - 1, rank + 1) if 0 <= r < len(self.probability)]
        if rank + 1 == len(self.probability) and rank > 0:
            return True
        return any(abs(self.probability[r] - self.probability[rank]) <= 2 * self.tolerance for r in near)


def read_manifest(folder: Path) -> Manifest:
    """Read `manifest.json` of a folder without checking its files. Raises ManifestError naming the file and the key."""
    path = folder / MANIFEST_NAME
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror}; run `dvc repro` to make it") from None
    except ValidationError as error:
        raise ManifestError(f"{path}: {_first_error(error)}; run `dvc repro` to remake it") from None


def load_manifest(folder: Path) -> Manifest:
    """Read `manifest.json` of an export folder, check the sha256 of its files. Raises ManifestError naming the file."""
    path = folder / MANIFEST_NAME
    manifest = read_manifest(folder)
    for name, expected in manifest.files.items():
        if Path(name).name != name:
            raise ManifestError(f"{path}: files names {name!r}; expected a file beside the manifest")
        check_file(folder / name, expected)
    return manifest


def check_file(path: Path, expected: str) -> None:
    """Compare a file's sha256 with `expected`, from the manifest. Raises ManifestError naming the file."""
    try:
        actual = sha256_of(path)
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror}; the manifest lists it") from None
    if actual != expected:
        raise ManifestError(f"{path}: sha256 is {actual[:12]}…, the manifest has {expected[:12]}…; export again")


def load_golden(folder: Path) -> list[Golden]:
    """Read `golden.json`: a JSON list of at least one `Golden`. Raises ManifestError naming the file and the key."""
    path = folder / GOLDEN_NAME
    try:
        golden = TypeAdapter(list[Golden]).validate_json(path.read_bytes())
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror}; run `dvc repro` to make it") from None
    except ValidationError as error:
        raise ManifestError(f"{path}: {_first_error(error)}; run `dvc repro` to remake it") from None
    if not golden:
        raise ManifestError(f"{path}: holds no golden request; expected at least one; run `dvc repro` to remake it")
    return golden


def _first_error(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else str(first["msg"])
