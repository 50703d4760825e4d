"""Sections `ingest`, `tracking` and `retrain` of params.yaml. No stage of dvc.yaml depends on them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.params.section import Count, NonNegative, Positive, PositiveInt, Section, Share


class IngestColumns(Section):
    """Columns of a table in the drop folder: label, and either encoded image bytes or a path relative to the table."""

    label: str = "label"
    image: str = "image"
    path: str = "path"


class IngestParams(Section):
    """Ingest of images from the drop folder.

    settle_seconds: a file counts as complete if it has not changed for this time. require_marker: read a folder of the
    drop only if it contains a file `.complete`. new_classes: `refuse`, `accept`, or a list of allowed new names.
    min_good_share: with a smaller share of good rows the whole drop is refused. taken: ingested files are kept in the
    drop folder's `.taken`, or removed. max_table_mib: memory limit for one column of a table.
    """

    drop: str = "data/drop"
    settle_seconds: NonNegative = 60.0
    require_marker: bool = False
    new_classes: Literal["refuse", "accept"] | list[str] = "refuse"
    min_good_share: Share = 0.7
    taken: Literal["keep", "remove"] = "keep"
    max_table_mib: PositiveInt = 256
    columns: IngestColumns = IngestColumns()


class TrackingParams(Section):
    """Experiment tracking besides DVC.

    mlflow: a tracking URI such as http://host:5000 or sqlite:///runs.db; null for none. experiment: its name in MLflow.
    """

    mlflow: str | None = None
    experiment: Annotated[str, Field(min_length=1)] = "tailor"


class RetrainParams(Section):
    """The flow `retrain`.

    repository: the Triton model repository of promoted versions. server: gRPC address of a remote server that serves
    it, with its key in TAILOR_ADMIN_KEY; null finds the servers of this user on this machine. keep: number of versions
    on disk. when_busy: whether a second run waits or is refused. rehearsal: test a version on a separate server before
    promotion, else in ONNX Runtime only. retries: per task, the first after retry_seconds, each later one after twice
    the time. load_seconds: timeout of one load. stage_hours: timeout of one stage. watch_seconds: how long golden
    requests are sent to a new champion before the promotion is final.
    """

    repository: Annotated[str, Field(min_length=1)] = "releases"
    server: Annotated[str, Field(pattern=r"^grpcs?://.+")] | None = None
    keep: Annotated[int, Field(ge=2)] = 5
    when_busy: Literal["refuse", "wait"] = "refuse"
    rehearsal: bool = True
    retries: Count = 2
    retry_seconds: NonNegative = 10.0
    load_seconds: Positive = 120.0
    stage_hours: Positive = 24.0
    watch_seconds: NonNegative = 5.0
