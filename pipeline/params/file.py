"""Read and validate params.yaml; error messages name the file, the key, the value and what is allowed."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from pipeline.params.data import DataParams, ImageParams, PriorParams, StreamParams
from pipeline.params.encoder import EncoderParams, TextParams, check_encoder_sections
from pipeline.params.operation import IngestParams, RetrainParams, TrackingParams
from pipeline.params.release import EvaluateParams, ExportParams, GateParams, ServingParams
from pipeline.params.second_stage import ClassifierParams
from pipeline.params.section import Section
from pipeline.params.tasks import SegmentationParams, Task, check_task
from pipeline.params.training import EngineParams, StudentParams, TrainingParams
from pipeline.shared.artifacts import PARAMS_FILE as PARAMS_FILE
from pipeline.shared.errors import ParamsError

QUERY_VIEWS = ("supcon", "bcl", "proco", "concutmix")  # contrast terms that do not compare the classifier view


class Params(Section):
    """All sections of params.yaml."""

    task: Task = "classification"
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
    engine: EngineParams = EngineParams()
    seeds: list[Annotated[int, Field(ge=0, lt=2**63)]] = []
    data: DataParams
    stream: StreamParams = StreamParams()
    image: ImageParams
    prior: PriorParams
    segmentation: SegmentationParams | None = None
    encoder: EncoderParams | None = None
    text: TextParams | None = None
    teacher: TrainingParams
    student: StudentParams
    classifier: ClassifierParams = ClassifierParams()
    evaluate: EvaluateParams
    export: ExportParams
    serving: ServingParams
    gate: GateParams = GateParams()
    ingest: IngestParams = IngestParams()
    tracking: TrackingParams = TrackingParams()
    retrain: RetrainParams = RetrainParams()

    @model_validator(mode="after")
    def _encoder_and_backbones_agree(self) -> Params:
        check_task(self)
        check_encoder_sections(self.encoder, self.image, {"teacher": self.teacher, "student": self.student})
        if self.student.memory and not self.encoder:
            raise ValueError(
                "student.memory is set, but section encoder is null; a memory holds features of an encoder"
            )
        if not (self.student.trains_classifier or self.classifier.fits_anew):
            raise ValueError(
                "student.gamma and student.alpha are both 0, so no term trains the classifier; set one of them above 0, "
                "or classifier.kind to a second stage that fits a new one (ncm, tau_norm, crt, balanced_softmax, or another "
                "with start: linear)"
            )
        _check_views(self.student, self.encoder)
        if self.student.uses_text and not self.text:
            raise ValueError(
                f"student.contrast_encoder is {self.student.contrast_encoder}, but section text is null; set it, such as to "
                "{encoder: features, file: text.safetensors}"
            )
        if self.student.uses_text and self.encoder and self.student.tune == "none" and not self.student.adapter:
            raise ValueError(
                f"student.contrast_encoder is {self.student.contrast_encoder}, but student.adapter is 0 and the encoder is "
                "frozen, so that L_GML trains no weight of the student; set student.adapter above 0, or student.tune"
            )
        _check_sampling(self)
        if self.serving.explain.map and self.export.precision != "float32":
            raise ValueError(
                f"serving.explain.map is true, but export.precision is {self.export.precision}; set map to false, or "
                "precision to float32"
            )
        if self.student.memory and self.classifier.kind != "none":
            raise ValueError(
                f"classifier.kind is {self.classifier.kind}, but student.memory is set; a second stage refits a "
                "student without a memory: set one of them to none or null"
            )
        if self.classifier.shift_batch_norm and self.encoder and self.student.tune == "none":
            raise ValueError(
                "classifier.shift_batch_norm is true, but the features of a frozen encoder are stored; set it to false"
            )
        return self


def _check_views(student: StudentParams, encoder: EncoderParams | None) -> None:
    """Raise ValueError for a term that compares two views of an image, if these are equal."""
    if not student.compares_views:
        return
    problem = f"student.contrast.kind is {student.contrast.kind}, which compares two views of an image, but "
    if encoder and student.tune == "none":
        if not encoder.views:
            raise ValueError(problem + "encoder.views is 0; set it to 1 or more")
    elif student.augment.equal_views(query_views=student.contrast.kind in QUERY_VIEWS):
        raise ValueError(
            problem
            + "student.augment makes them equal; set flip, crop_padding, crop_scale below 1, policy or contrast_policy"
        )


def _check_sampling(params: Params) -> None:
    """Raise ValueError for sections that do not fit student.sampling."""
    student, teacher = params.student, params.teacher
    if student.sampling == 1:
        return
    problem = f"student.sampling is {student.sampling:g}, but "
    if params.prior.weighting != "frequency":
        raise ValueError(
            f"{problem}prior.weighting is {params.prior.weighting}; both change the prior in the losses: set one of them to "
            "1.0 or frequency"
        )
    if student.alpha and teacher.assumed_adjustment not in (None, 1.0):
        raise ValueError(
            f"{problem}student.alpha is {student.alpha:g} and teacher.adjustment {teacher.adjustment:g}, so that their logits "
            "have other priors; set teacher.adjustment: 1.0, or student.alpha: 0.0"
        )


def load_params(path: Path = PARAMS_FILE) -> Params:
    """Read and validate a params file. Raises ParamsError with the file, the key, the value and what is allowed."""
    return parse_params(read_yaml(path), path)


class _UniqueKeys(yaml.SafeLoader):
    """YAML safe loader that rejects duplicate keys; PyYAML uses the last one without a warning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct the mapping of a node. Raises ConstructorError with the duplicate key and its line."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping. Raises ParamsError otherwise."""
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
    """Validate the content of a params file; `path` is used only in messages."""
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        # Missing keys last: a misspelt key is often the cause of a missing one.
        entries = sorted(error.errors(), key=lambda entry: entry["type"] == "missing")
        raise ParamsError("; ".join(_explain(path, entry) for entry in entries[:3])) from None


def _explain(path: Path, entry: Any) -> str:
    location, siblings = _keys(entry["loc"])
    key = ".".join(location)
    if entry["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(location[-1], siblings, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join(location[:-1] + nearest)}?" if nearest else f"allowed: {', '.join(siblings)}"
        return f"{path}: {key} is not a key; {hint}"
    if entry["type"] == "missing":
        return f"{path}: {key} is missing; add it (see the file's default in the repository)"
    message = entry["msg"].removeprefix("Value error, ")
    if not key:  # an error about several sections; the message names them
        return f"{path}: {message}"
    value = "" if isinstance(entry["input"], dict | BaseModel) else f" is {entry['input']!r};"
    return f"{path}: {key}{value or ':'} {message[:1].lower()}{message[1:]}"


def _keys(location: tuple[str | int, ...]) -> tuple[list[str], list[str]]:
    """Keys of an error's location, and the keys that are allowed beside the last; pydantic adds the kind of some sections."""
    keys, beside, sections = list[str](), list[Any](), list[Any]([Params])
    for part in map(str, location):
        if part.startswith(":"):  # the tag of a union, not a key
            continue
        kinds = {section.model_fields["kind"].annotation: section for section in sections} if len(sections) > 1 else {}
        if chosen := kinds.get(Literal[part]):  # type: ignore[valid-type]
            sections = [chosen]
            continue
        keys.append(part)
        beside, sections = sections, _sections_at(sections, part)
    return keys, sorted({key for section in beside for key in section.model_fields})


def _sections_at(sections: list[Any], key: str) -> list[Any]:
    """Sections that a key may hold; the annotation of an optional section is a union with None."""
    field = next((section.model_fields[key] for section in sections if key in section.model_fields), None)
    return _sections_in(field.annotation) if field else []


def _sections_in(annotation: Any) -> list[Any]:
    if hasattr(annotation, "model_fields"):
        return [annotation]
    return [section for option in get_args(annotation) for section in _sections_in(option)]
