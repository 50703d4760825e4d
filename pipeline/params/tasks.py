"""Key `task` and section `segmentation` of params.yaml, and which other sections a task needs or excludes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from pipeline.params.section import NonNegative, Positive, PositiveInt, Section, Share

if TYPE_CHECKING:
    from pipeline.params.file import Params

Task = Literal["classification", "segmentation"]
Side = Annotated[int, Field(ge=16, le=4096)]


class SegmentationAugmentParams(Section):
    """Augmentation of an image with its label map: resize, crop, flip, photometric distortion, as in mmsegmentation.

    scale: [long side, short side] in pixels that the image is fitted into, keeping its ratio; None: the image's own
    size. ratio: range of a random factor of that size, uniform. crop: [height, width] in pixels; a smaller image is padded
    with the mean colour and with ignored labels. max_share: a crop is drawn again, up to ten times, if one class has this
    share of its labelled pixels or more; 1 accepts the first crop. flip: mirror half of the images. photometric: random
    brightness, contrast, saturation and hue.
    """

    scale: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)] | None = None
    ratio: Annotated[list[Positive], Field(min_length=2, max_length=2)] = [0.5, 2.0]
    crop: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)] = [512, 512]
    max_share: Share = 0.75
    flip: bool = True
    photometric: bool = True

    @model_validator(mode="after")
    def _ranges_rise(self) -> SegmentationAugmentParams:
        if self.ratio[0] > self.ratio[1]:
            raise ValueError(f"ratio is {self.ratio}; expected the smaller factor first")
        if self.scale and self.scale[0] < self.scale[1]:
            raise ValueError(f"scale is {self.scale}; expected the long side first")
        return self


class SegmentationParams(Section):
    """Task segmentation: input size, heads, cells of the GML loss, augmentation of teacher and student.

    canvas: [height, width] of the network's input in evaluation and serving. An image is resized to fit, keeping its
    ratio, and padded at the bottom and at the right. classifier: of both heads, `cosine` or `linear` (with tau_s 1).
    auxiliary: weight of the auxiliary head's L_cls. average: divisor of a pixel loss, the pixels with a class (`valid`)
    or all pixels (`official`, mmsegmentation). queries: cells compared in a step. keys: cells stored in the queues in a
    step, of them at most keys_per_class of a class in an image. Both are of each process.
    """

    canvas: Annotated[list[Side], Field(min_length=2, max_length=2)]
    classifier: Literal["cosine", "linear"] = "cosine"
    auxiliary: NonNegative = 0.4
    average: Literal["valid", "official"] = "valid"
    queries: PositiveInt = 4096
    keys: PositiveInt = 512
    keys_per_class: PositiveInt = 4
    augment: SegmentationAugmentParams = SegmentationAugmentParams()


def check_task(params: Params) -> None:
    """Raise ValueError that names the key for a section or value that the task lacks or does not support."""
    if params.task == "classification":
        found = {"segmentation": params.segmentation, "data.label_map": params.data.label_map}
        for key, value in found.items():
            if value is not None:
                raise ValueError(f"{key} is set, but task is classification; set task: segmentation or {key}: null")
        if params.data.source == "ade20k" or params.data.table.split:
            key = "data.source: ade20k" if params.data.source == "ade20k" else "data.table.split"
            raise ValueError(f"{key} is for task segmentation, but task is classification")
        for name, section in (("teacher", params.teacher), ("student", params.student)):
            if section.schedule.kind == "poly":
                raise ValueError(
                    f"{name}.schedule.kind is poly, which is for task segmentation; expected cosine or steps"
                )
        if params.student.contrast_encoder == "self" and params.student.contrast.kind == "gml":
            raise ValueError(
                "student.contrast_encoder is self, but task classification has it for other kinds than gml; set it to teacher "
                "or momentum, or student.contrast.kind to another term"
            )
        return
    for key, missing in (("segmentation", params.segmentation), ("data.label_map", params.data.label_map)):
        if missing is None:
            raise ValueError(f"task is segmentation, but section {key} is null; set it")
    _check_segmentation(params)


def _check_segmentation(params: Params) -> None:
    data, student = params.data, params.student
    allowed = {
        "data.source": (data.source, ("table", "folder", "ade20k")),
        "data.profile": (data.profile, ("natural",)),
        "prior.weighting": (params.prior.weighting, ("frequency",)),
        "encoder": (params.encoder, (None,)),
        "teacher.loss.kind": (params.teacher.loss.kind, ("cross_entropy",)),
        "student.loss.kind": (student.loss.kind, ("cross_entropy",)),
        "teacher.classifier.kind": (params.teacher.classifier.kind, ("cosine",)),
        "student.classifier.kind": (student.classifier.kind, ("cosine",)),
        "teacher.adapter": (params.teacher.adapter, (0,)),
        "student.adapter": (student.adapter, (0,)),
        "student.memory": (student.memory, (None,)),
        "student.experts": (student.experts, (None,)),
        "student.alpha": (student.alpha, (0,)),
        "student.sampling": (student.sampling, (1.0,)),
        "student.pretraining": (student.pretraining, ("none",)),
        "student.train_tau_g": (student.train_tau_g, (False,)),
        "student.contrast.kind": (student.contrast.kind, ("gml",)),
        "student.contrast_encoder": (student.contrast_encoder, ("teacher", "self")),
        "classifier.kind": (params.classifier.kind, ("none",)),
        "export.precision": (params.export.precision, ("float32",)),
        "engine.checkpoint_activations": (params.engine.checkpoint_activations, (False,)),
        "teacher.accumulate": (params.teacher.accumulate, (1,)),
        "student.accumulate": (student.accumulate, (1,)),
    }
    for key, (value, values) in allowed.items():
        if value not in values:
            expected = " or ".join("null" if each is None else str(each).lower() for each in values)
            raise ValueError(f"{key} is {value!r}, which task segmentation does not support; expected {expected}")
    if not student.gamma:
        raise ValueError("student.gamma is 0, so that no term trains the classifier; expected a value above 0")
