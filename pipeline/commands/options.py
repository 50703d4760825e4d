"""Options that the pipeline's commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.artifacts import REPOSITORY

ParamsOption = Annotated[Path, typer.Option(help="The recipe.")]


def repository_of(given: Path | None, params: Path) -> Path:  # noqa: ARG001
    """The repository that a command is about: the one given, or that of the project."""
    return given or REPOSITORY
