"""Command-line options shared by the pipeline's commands."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pipeline.shared.artifacts import PARAMS_FILE, REPOSITORY
from serving.commands.options import RELEASES, choose_repository


class TargetPrior(StrEnum):
    """Target class prior of the predictions."""

    balanced = "balanced"
    train = "train"


ParamsOption = Annotated[Path, typer.Option(help="The params file.")]
RepositoryOption = Annotated[
    Path | None,
    typer.Option(
        help=f"Triton model repository; if not given, retrain.repository of {PARAMS_FILE} (the promoted versions) if that "
        f"folder exists, else {REPOSITORY}.",
        show_default=False,
    ),
]


def repository_of(argument: Path | None, params: Path) -> Path:
    """Choose the model repository of a command by `choose_repository`; promoted versions are in retrain.repository."""
    if argument is not None or not params.is_file():
        return choose_repository(argument, RELEASES)
    from pipeline.params import load_params

    return choose_repository(None, Path(load_params(params).retrain.repository))
