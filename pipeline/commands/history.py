"""`tailor history`: every version with its story."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.commands.options import ParamsOption, RepositoryOption, repository_of
from pipeline.params import PARAMS_FILE
from serving.commands.options import AsJson, Debug, print_json
from serving.release_history import history_table, read_history
from serving.terminal import Console

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(epilog="Example: tailor history --json | jq '.versions[] | {version, state, data_sha256}'")
def history(
    repository: RepositoryOption = None,
    params: ParamsOption = PARAMS_FILE,
    wide: Annotated[bool, typer.Option("--wide", help="Show the hashes of data, params and code too.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,  # noqa: ARG001
) -> None:
    """List every version with its data, metrics and decision."""
    found = read_history(repository_of(repository, params))
    if as_json:
        print_json(found.as_mapping())
    else:
        Console().print(history_table(found, wide))
