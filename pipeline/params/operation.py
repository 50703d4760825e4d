"""Sections `ingest`, `tracking` and `retrain`: how Tailor runs from day to day. No stage of dvc.yaml depends on them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.params.section import Count, NonNegative, Positive, PositiveInt, Section, Share


class IngestColumns(Section):
    """Columns of a table in the drop folder: its label, and either encoded image bytes or a path relative to the table."""

    label: str = "label"
    image: str = "image"
    path: str = "path"


class IngestParams(Section):
    """What is taken in from the drop folder, and when.

    settle_seconds: a file counts as written once it has not changed for so long. require_marker: a folder of the drop is
    read only once a file `.complete` lies in it. new_classes: `refuse`, `accept`, or the names that may appear.
    min_good_share: of a drop's rows; with fewer good ones it is refused whole. taken: files whose images were taken in are
    kept in the drop folder's own `.taken`, or removed. max_table_mib: the most memory that one column of a table may take.
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
    """Where runs are recorded besides DVC.

    mlflow: a tracking URI such as http://host:5000 or sqlite:///runs.db; null for none. experiment: its name there.
    """

    mlflow: str | None = None
    experiment: Annotated[str, Field(min_length=1)] = "tailor"


class RetrainParams(Section):
    """The flow `retrain`.

    repository: the Triton model repository of what was promoted. server: gRPC address of a server elsewhere that serves
    it, its key in TAILOR_ADMIN_KEY; null finds the servers of this user on this machine. keep: versions on disk. when_busy:
    what a second run does. rehearsal: try a version on a server of its own first, else in ONNX Runtime alone. retries of
    a task, the first after retry_seconds, each later one after twice as long. load_seconds: that one load may take.
    stage_hours: that one stage may take. watch_seconds: for how long golden requests are sent to a new champion before the
    run counts it as promoted.
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
