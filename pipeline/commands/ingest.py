"""`tailor ingest`: new labelled images into the training split."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.options import ParamsOption
from pipeline.ingest import ingest as take_in
from pipeline.params import PARAMS_FILE, load_params
from pipeline.project import keep_out_of_git
from serving.commands.options import AsJson, Debug, print_json
from serving.terminal import print

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(epilog="Example: tailor ingest --drop data/drop --json | jq .quarantined")
def ingest(
    drop: Annotated[
        Path | None, typer.Option(help="Folder to take in; that of ingest.drop in params.yaml if not given.")
    ] = None,
    params: ParamsOption = PARAMS_FILE,
    as_json: AsJson = False,
    debug: Debug = False,  # noqa: ARG001
) -> int:
    """Add labelled images of the drop folder to the training split.

    It holds a folder per class, or tables (CSV, Parquet) with a label column. Good rows become one shard of data/ingested/, bad
    ones go to data/quarantine/ with the reason; `dvc repro` then trains on all. Status 1 when the drop is refused whole.
    """
    settings = load_params(params)
    keep_out_of_git(drop or Path(settings.ingest.drop))
    report = take_in(settings, drop)
    if as_json:
        print_json(asdict(report) | {"shard": report.shard and str(report.shard)})
    else:
        print(f"ingest: {report}")
    return 1 if report.refused else 0
