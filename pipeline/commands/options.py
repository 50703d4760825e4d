"""Options that the pipeline's commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.artifacts import REPOSITORY
from pipeline.params import load_params

ParamsOption = Annotated[Path, typer.Option(help="The recipe.")]


def repository_of(given: Path | None, params: Path) -> Path:
    """The repository that a command is about: the one given; what retraining has promoted; or that of `dvc repro`."""
    if given is not None:
        return given
    if params.is_file():
        promoted = Path(load_params(params).retrain.repository)
        if promoted.is_dir():
            return promoted
    return REPOSITORY
