"""Options that the pipeline's commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.artifacts import REPOSITORY
from pipeline.params import load_params
from serving.commands.options import RELEASES, choose_repository

ParamsOption = Annotated[Path, typer.Option(help="The recipe.")]
RepositoryOption = Annotated[
    Path | None,
    typer.Option(
        help="Triton model repository; retrain.repository of the recipe (what was promoted) where there is that folder, "
        f"else {REPOSITORY}.",
        show_default=False,
    ),
]


def repository_of(given: Path | None, params: Path) -> Path:
    """The repository that a command is about, by the rule of all commands: what was promoted lies where the recipe says."""
    known = given is None and params.is_file()
    return choose_repository(given, Path(load_params(params).retrain.repository) if known else RELEASES)
