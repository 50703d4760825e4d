"""`tailor compare`: compare two runs on their common test set."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.options import RepositoryOption, TargetPrior, repository_of
from pipeline.shared.artifacts import PARAMS_FILE
from serving.commands.options import AsJson, Debug, print_json
from serving.shared.terminal import print

if TYPE_CHECKING:
    from pipeline.evaluation.predictions import Answers
    from pipeline.params import Params

ECE_BINS = 15  # if there is no params file
HELP = "A run's folder, a git revision or DVC experiment, a published version's number, or `champion`."


def compare(
    before: Annotated[str, typer.Argument(metavar="A", help=HELP)],
    after: Annotated[str, typer.Argument(metavar="B", help="The run that is compared with A, named in the same way.")],
    prior: Annotated[TargetPrior, typer.Option(help="Which answers are compared.")] = TargetPrior.balanced,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with charts as well.")] = None,
    classes: Annotated[
        int, typer.Option(min=0, help="Classes that the terminal shows, most surely changed first.")
    ] = 10,
    repository: RepositoryOption = None,
    params: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The recipe, for the gate's confidence and resamples and for a version's images; params.yaml if it is there.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,  # noqa: ARG001
) -> None:
    """Compare run B with run A on their common test set.

    Prints paired differences with intervals, in all, by group and by class. A and B are folders of runs (a project, its
    artifacts, or a copy of predictions.parquet and prior.json), revisions whose results DVC has kept, or published
    versions, which answer the current test split in ONNX Runtime.
    """
    from pipeline.evaluation.run_comparison import as_json as content
    from pipeline.evaluation.run_comparison import compare_runs
    from pipeline.params import GateParams, load_params

    recipe = load_params(params or PARAMS_FILE) if params or PARAMS_FILE.is_file() else None
    gate = (recipe.gate if recipe else GateParams()).model_copy(update={"target_prior": prior.value})
    # Called only for a version, because folders and revisions need no repository; cached, because it may print a line.
    chosen = cache(lambda: repository_of(repository, params or PARAMS_FILE))
    runs = [_answers(name, chosen, recipe, prior.value) for name in (before, after)]
    found = compare_runs(runs[0], runs[1], (before, after), gate, recipe.evaluate.ece_bins if recipe else ECE_BINS)
    if html is not None:
        from pipeline.report import render_comparison
        from pipeline.shared.artifacts import write_file

        write_file(
            html, render_comparison(found, f"tailor compare {before} {after} --prior {prior.value} --html {html}")
        )
    if as_json:
        print_json(content(found))
        return
    from pipeline.commands.comparison_table import show

    show(found, classes)
    if html is not None:
        print(f"page → {html}")


def _answers(name: str, repository: Callable[[], Path], params: Params | None, target_prior: str) -> Answers:
    """Predictions of a run on the test set. Raises StageError or ServingError with the name of the run."""
    from pipeline.evaluation.predictions import load_answers
    from pipeline.evaluation.runs import load_run, load_run_at_revision
    from pipeline.onnx_export.published_version import served_answers
    from pipeline.shared.errors import ParamsError, StageError

    if Path(name).is_dir():
        return load_answers(load_run(Path(name)), target_prior)
    if name == "champion" or (name.isdecimal() and len(name) < 7):  # an abbreviated commit hash has 7 digits
        if params is None:
            raise ParamsError(
                f"{PARAMS_FILE}: no such file; a version's images are the recipe's, so pass --params FILE"
            )
        return served_answers(repository(), None if name == "champion" else int(name), params, target_prior)
    with tempfile.TemporaryDirectory(prefix="tailor-compare-") as folder:
        try:
            return load_answers(load_run_at_revision(name, Path(folder)), target_prior)
        except StageError as error:
            raise type(error)(str(error).replace(f"{folder}/", f"{name}: ")) from None
