"""Sections `data`, `stream`, `image` and `prior` of params.yaml: source, splits, streaming, input size, class prior."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from models.prior import class_key
from pipeline.params.section import Count, NonNegative, Number, Positive, PositiveInt, Section, Share


class TableParams(Section):
    """Columns and files of the `table` source; paths are relative to data.location.

    A split is a file, a glob pattern, a folder of Parquet shards, or a list of these; a null split is held out of
    train. label_type: of a CSV file, whose cells are text; auto reads integers if class_names is set. max_mib: memory
    limit for one column of a row group, and for a whole column of labels, paths or ids. split: of task segmentation,
    column with the split of each row of the files of `train`: train, val (or validation), test.
    """

    train: str | list[str] = "train.parquet"
    validation: str | list[str] | None = None
    test: str | list[str] | None = None
    image: str | None = "image"
    path: str | None = None
    label: str = "label"
    label_type: Literal["auto", "text", "integer"] = "auto"
    split: str | None = None
    id: str | None = None
    class_names: list[str] | None = None
    max_mib: PositiveInt = 1024

    @model_validator(mode="after")
    def _one_way_to_the_image(self) -> TableParams:
        if (self.image is None) == (self.path is None):
            raise ValueError("set exactly one of image (a column of encoded bytes) and path (a column of file paths)")
        return self


class ListParams(Section):
    """List files of imagenet_lt, places_lt and inaturalist2018, if not in data.location under their official names."""

    train: str | None = None
    validation: str | None = None
    test: str | None = None


class LabelMapParams(Section):
    """Label maps of task segmentation: PNG files of 8 bits, one class number per pixel.

    class_names: names of the labels 0..C-1. column: of encoded label maps, of source table. ignored: value of a pixel
    without a class. reduce_zero_label: 0 is a pixel without a class, and 1..C are the classes 0..C-1, as in ADE20K.
    """

    class_names: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=2, max_length=255)]
    column: str = "label_map"
    ignored: Annotated[int, Field(ge=0, le=255)] = 255
    reduce_zero_label: bool = False

    @model_validator(mode="after")
    def _labels_do_not_overlap(self) -> LabelMapParams:
        names = [class_key(name) for name in self.class_names]
        if len(set(names)) < len(names):
            repeated = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"class_names has {repeated!r} twice; expected names that differ")
        first = int(self.reduce_zero_label)
        if first <= self.ignored < first + len(self.class_names):
            raise ValueError(
                f"ignored is {self.ignored}, which is a class; expected a value outside {first} to "
                f"{first + len(self.class_names) - 1}"
            )
        return self


def _group(value: str) -> str:
    kind, _, text = value.partition(":")
    if value != "near" and not (kind in ("column", "path") and text):
        raise ValueError("is none of near, column:NAME of a table, and path:REGEX, a regular expression")
    if kind == "path":
        try:
            re.compile(text)
        except re.error as error:
            raise ValueError(f"is not a regular expression: {error}") from None
    return value


class DataParams(Section):
    """Data source, long-tail profile, and held-out images.

    max_per_class: largest number of training images per class, chosen by `seed` before the profile; null is all.
    test_share: test images as a share of each class, at least one and at most test_per_class; null is test_per_class
    for every class. group: images of one group are held out together: near, column:NAME of a table, or path:REGEX.
    taxonomy: a CSV file with the columns name and parent (models/taxonomy.py); null for none.
    label_map: of task segmentation, where all images together count as one class of max_per_class, test_per_class,
    test_share, validation_per_class and validation_share.
    """

    source: Literal[
        "digits", "folder", "table", "cifar10", "cifar100", "imagenet_lt", "places_lt", "inaturalist2018", "ade20k"
    ]
    location: str
    download: bool = False
    lists: ListParams = ListParams()
    table: TableParams = TableParams()
    label_map: LabelMapParams | None = None
    on_bad_image: Literal["fail", "skip"] = "fail"
    profile: Literal["natural", "exponential", "pareto", "step"]
    imbalance_factor: Annotated[Number, Field(ge=1, allow_inf_nan=False)]
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    max_per_class: PositiveInt | None = None
    test_per_class: PositiveInt
    test_share: Annotated[Number, Field(gt=0, lt=1)] | None = None
    validation_per_class: Count
    validation_share: Share
    group: Annotated[str, AfterValidator(_group)] | None = None
    taxonomy: Annotated[str, Field(min_length=1)] | None = None


def _on_or_off(value: Any) -> Any:
    """Map true and false back to the words `on` and `off`, which YAML 1.1 reads as booleans."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class StreamParams(Section):
    """Streaming: whether training reads images on demand or holds all in memory.

    Streaming changes only rounding and, for tables, the order of images. mode: auto streams if the decoded split takes
    more than half of the free memory of device or host; with resized crops, as many originals stay in memory as fit
    into half of it. workers: threads that read and decode; auto is one per core. prefetch: batches read ahead. decode:
    `fast` may differ from `exact`, the server's decoding, by one grey level; `gpu` is nvJPEG on CUDA. shuffle_mib:
    amount of a table that is shuffled at a time.
    """

    mode: Annotated[Literal["auto", "on", "off"], BeforeValidator(_on_or_off)] = "auto"
    workers: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = "auto"
    prefetch: Annotated[int, Field(ge=1, le=64)] = 4
    decode: Literal["fast", "exact", "gpu"] = "fast"
    shuffle_mib: Annotated[int, Field(ge=1)] = 128


class ImageParams(Section):
    """Network input: shorter side to resize_to, centre crop of size (pixels), then (x/255 - mean) / std per channel.

    interpolation: filter of the resize in `embed` and in the server; bicubic needs an encoder.
    """

    size: Annotated[int, Field(ge=8, le=1024)]
    resize_to: Annotated[int, Field(ge=8, le=2048)]
    mean: Annotated[list[Share], Field(min_length=3, max_length=3)]
    std: Annotated[list[Positive], Field(min_length=3, max_length=3)]
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    @model_validator(mode="after")
    def _crop_fits(self) -> ImageParams:
        if self.resize_to < self.size:
            raise ValueError(f"resize_to is {self.resize_to}, below size {self.size}; the crop would not fit")
        return self


class PriorParams(Section):
    """Class prior. smoothing: pseudo-count added to each class; with 0, a class without training samples is an error.

    weighting: effective_number replaces the count n by (1 - beta^n) / (1 - beta) (Cui et al. 2019) in the prior of the
    losses only; evaluation and export add the difference.
    """

    smoothing: NonNegative
    weighting: Literal["frequency", "effective_number"] = "frequency"
    beta: Annotated[Number, Field(gt=0, lt=1)] = 0.9999
