"""Section `retrain`: how the flow runs and where what it promotes lives. No stage of dvc.yaml depends on it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.params.section import Count, NonNegative, Positive, Section


class RetrainParams(Section):
    """The flow `retrain`.

    repository: the Triton model repository of what was promoted. server: gRPC address of a server elsewhere that serves
    it, its key in TAILOR_ADMIN_KEY; null finds those of this user on this machine. keep: versions on disk. when_busy:
    what a second run does. rehearsal: try a version on a server of its own first, else in ONNX Runtime alone. retries of
    a task, the first after retry_seconds, each later one after twice as long. load_seconds: that one load may take.
    stage_hours: that one stage may take. watch_seconds: for how long a new champion is asked golden requests before the
    run calls it promoted.
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
