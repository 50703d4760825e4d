"""What a server answers, typed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prediction:
    """The answer for one image: the best classes by name and index, their probabilities, the version that gave it."""

    classes: tuple[str, ...]
    indexes: tuple[int, ...]
    probabilities: tuple[float, ...]
    version: int


@dataclass(frozen=True)
class ModelStatus:
    """A model as the server sees it: the versions that it serves, none when it is not loaded."""

    name: str
    versions: tuple[int, ...]


@dataclass(frozen=True)
class Status:
    """A server's state. `answers`: whether the classifier answered an image just now; ready endpoints alone can lie."""

    url: str
    server: str
    server_version: str
    models: tuple[ModelStatus, ...]
    answers: bool
    problem: str | None
