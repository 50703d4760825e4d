"""Options that the pipeline's commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ParamsOption = Annotated[Path, typer.Option(help="The recipe.")]
