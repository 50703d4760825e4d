"""Sections `data`, `stream`, `image` and `prior`: where the images come from, and what is made of them before any training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipeline.params.section import Count, NonNegative, Number, Positive, PositiveInt, Section, Share


class TableParams(Section):
    """Columns and files of the `table` source; paths are relative to data.location. A null split is held out of train.

    A split is a file, a glob pattern, a folder of Parquet shards, or a list of these. label_type: of a CSV file, whose cells
    are text; auto reads integers where class_names are given. max_mib: the most memory that one column of a row group, or
    a whole column of labels, paths or ids, may take.
    """

    train: str | list[str] = "train.parquet"
    validation: str | list[str] | None = None
    test: str | list[str] | None = None
    image: str | None = "image"
    path: str | None = None
    label: str = "label"
    label_type: Literal["auto", "text", "integer"] = "auto"
    id: str | None = None
    class_names: list[str] | None = None
    max_mib: PositiveInt = 1024

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
    """Where the images come from, how long the tail is made, and what is held out.

    max_per_class: training images of a class that are used at most, chosen by `seed` before the profile; null is all.
    test_share: test images as a share of each class, at least one and at most test_per_class; null is test_per_class of
    every class.
    """

    source: Literal["digits", "folder", "table", "cifar10", "cifar100", "imagenet_lt", "places_lt", "inaturalist2018"]
    location: str
    download: bool = False
    lists: ListParams = ListParams()
    table: TableParams = TableParams()
    on_bad_image: Literal["fail", "skip"] = "fail"
    profile: Literal["natural", "exponential", "pareto", "step"]
    imbalance_factor: Annotated[Number, Field(ge=1, allow_inf_nan=False)]
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    max_per_class: PositiveInt | None = None
    test_per_class: PositiveInt
    test_share: Annotated[Number, Field(gt=0, lt=1)] | None = None
    validation_per_class: Count
    validation_share: Share


def _on_or_off(value: Any) -> Any:
    """YAML's reading of a bare `on` or `off` (true or false: YAML 1.1) as the word that the user wrote."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class StreamParams(Section):
    """Whether training reads images as it needs them or holds them all. Changes rounding and, for tables, the order; no more.

    mode auto: a stream where the decoded split is more than half of what is free on device or host; of originals that
    resized crops are cut from, as many stay in memory as fit into half of it. workers: threads that read and decode; auto
    is one a core. prefetch: batches read ahead. decode: `fast` may differ from `exact`, the server's, by one grey level;
    `gpu` is nvJPEG on CUDA. shuffle_mib: of a table, how much is shuffled at a time.
    """

    mode: Annotated[Literal["auto", "on", "off"], BeforeValidator(_on_or_off)] = "auto"
    workers: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = "auto"
    prefetch: Annotated[int, Field(ge=1, le=64)] = 4
    decode: Literal["fast", "exact", "gpu"] = "fast"
    shuffle_mib: Annotated[int, Field(ge=1)] = 128


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

    weighting effective_number puts (1 - beta^n) / (1 - beta) in the place of n (Cui et al. 2019) in the prior of the losses,
    and nowhere else: evaluation and export add the difference.
    """

    smoothing: NonNegative
    weighting: Literal["frequency", "effective_number"] = "frequency"
    beta: Annotated[Number, Field(gt=0, lt=1)] = 0.9999
