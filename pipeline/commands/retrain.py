"""`tailor ingest`, `retrain`, `add-class`, `schedule` and `history`: add images and classes, retrain, list versions."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.options import ParamsOption, RepositoryOption, repository_of
from pipeline.shared.artifacts import EXPORT, PARAMS_FILE
from pipeline.shared.errors import ParamsError
from serving.commands.options import AsJson, Debug, print_json
from serving.promotion.history import history_table, read_history
from serving.shared.terminal import Console, cell, print


def ingest(
    drop: Annotated[
        Path | None, typer.Option(help="Folder with the new images; ingest.drop of the params file if not given.")
    ] = None,
    params: ParamsOption = PARAMS_FILE,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Add labelled images of the drop folder to training.

    It contains a folder per class, or tables (CSV, Parquet) with a label column. Good rows become one shard of data/ingested/,
    bad rows go to data/quarantine/ with the reason; `dvc repro` then trains on all. Exit status 1 if the whole drop is refused.
    """
    from pipeline.ingestion import ingest
    from pipeline.params import load_params
    from pipeline.preparation.project import keep_out_of_git

    recipe = load_params(params)
    keep_out_of_git(drop or Path(recipe.ingest.drop))
    report = ingest.ingest(recipe, drop)
    if as_json:
        print_json(asdict(report) | {"shard": report.shard and str(report.shard)})
    else:
        print(f"ingest: {report}")
    return 1 if report.refused else 0


def retrain(
    because: Annotated[str, typer.Option(help="The reason; recorded with the decision.")] = "requested by hand",
    drop: Annotated[
        Path | None, typer.Option(help="Drop folder with new images; ingest.drop of the params file if not given.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Ingest new data, retrain, and promote if the gate passes.

    Unchanged stages do not run again. One run of the flow on this machine; it starts a Prefect server unless one runs. After
    the command was killed, run it again to complete the run. Exit status 0 if the run finished: promoted, refused, undecided
    because the test images are too few, or unchanged. 1 if it failed or another run was in progress.
    """
    from pipeline.preparation.project import keep_out_of_git
    from pipeline.scheduling.trigger import run_once

    if drop:
        keep_out_of_git(drop)
    outcome = run_once(because, drop, tracebacks=debug)
    if as_json:
        print_json({"ending": outcome.ending, "message": outcome.message, "version": outcome.version,
                    "evidence": outcome.evidence})  # fmt: skip
    else:
        _print_comparison(outcome.evidence)
        print(f"{outcome.ending}: {outcome.message}")
        if outcome.evidence:
            print(f"reasons: {outcome.evidence}/decision.json and report.html")
    return 1 if outcome.ending in ("failed", "busy") else 0


def _print_comparison(evidence: str | None) -> None:
    """Print the comparison of champion and challenger from the evidence folder as a table."""
    import json

    from rich.table import Table

    from pipeline.evaluation.comparison import Measure
    from pipeline.flows.prefect_artifacts import comparison_rows

    path = Path(evidence or "") / "decision.json"
    if evidence is None or not path.is_file():
        return
    measures = json.loads(path.read_text(encoding="utf-8"))["measures"]
    rows = comparison_rows({name: Measure(**measure) for name, measure in measures.items()})
    if rows:
        table = Table(title="challenger against champion", box=None, title_justify="left")
        columns = ("measure", "champion", "challenger", "difference", "interval", "verdict")  # fit into 80 columns
        for name in columns:
            table.add_column(name, no_wrap=True)
        for row in rows:
            table.add_row(*(cell(row[name]) for name in columns))
        Console().print(table)


def schedule(
    cron: Annotated[str, typer.Option(help="When: minute, hour, day, month, weekday.")],
    timezone: Annotated[str | None, typer.Option(help="IANA name of the time zone; UTC if not given.")] = None,
    port: Annotated[int, typer.Option(help="Port of Prefect's server and its pages; 0 for any free one.")] = 4200,
    debug: Debug = False,
) -> None:
    """Retrain on a schedule until SIGTERM or Ctrl-C.

    Runs a Prefect server on loopback, its database in .prefect/, or uses the one that PREFECT_API_URL names. The schedule
    survives a restart; missed runs are replaced by one run. For a work pool of your own, see prefect.yaml.
    """
    from pipeline.scheduling.schedule import run_schedule

    run_schedule(cron, timezone, lambda line: print(f"schedule: {line}", file=sys.stderr, flush=True), port)


def history(
    repository: RepositoryOption = None,
    params: ParamsOption = PARAMS_FILE,
    wide: Annotated[bool, typer.Option("--wide", help="Show the hashes of data, params and code too.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List every version with its data, metrics and decision."""
    versions = read_history(repository_of(repository, params))
    if as_json:
        print_json(versions.as_mapping())
    else:
        Console().print(history_table(versions, wide))


def add_class(
    name: Annotated[str, typer.Argument(help="Name of the new class.", show_default=False)],
    folder: Annotated[Path, typer.Argument(help="Folder of its images, at any depth.", show_default=False)],
    export: Annotated[Path, typer.Option(help="Release to which the class is added.")] = EXPORT,
    output: Annotated[Path, typer.Option(help="Folder of the result.")] = Path("artifacts/added_class"),
    held_out: Annotated[int, typer.Option(min=1, help="Images that test the class; at most half.")] = 5,
    margin: Annotated[
        float, typer.Option(min=0, max=1, help="Largest fall of the old classes' balanced accuracy on the test split.")
    ] = 0.01,
    floor: Annotated[
        float, typer.Option(min=0, max=1, help="Least share of held-out images that are recognised.")
    ] = 0.5,
    params: ParamsOption = PARAMS_FILE,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Add a class to the release without training.

    The mean feature of its images becomes one more row of the cosine classifier. If the old classes keep their accuracy and
    the held-out images are recognised, the new release is written with a repository of its own, and the images are
    ingested, so that the next retraining learns the class. Exit status 1 if the gate refuses.
    """
    from pipeline.onnx_export import added_class
    from pipeline.params import load_params
    from pipeline.preparation.project import keep_out_of_git
    from serving.client.images import image_files

    if not folder.is_dir():
        raise ParamsError(f"{folder}: is not a folder; expected one with images of the class")
    keep_out_of_git(folder)
    rules = added_class.Rules(held_out, margin, floor)
    result = added_class.add_class(load_params(params), name, image_files(folder), export, output, rules)
    if as_json:
        print_json(asdict(result))
    else:
        print(f"add-class: {result}")
        if result.promote:
            print(f"ingest: {result.ingested}\nserve it: tailor serve --repository {result.output}/repository")
    return 0 if result.promote else 1
