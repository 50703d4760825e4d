"""`tailor gate`, `tailor compare` and `tailor shifted-priors`: the promotion decision, two runs, accuracy under label shift."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from pipeline.commands.options import ParamsOption, RepositoryOption, TargetPrior, repository_of
from pipeline.shared.artifacts import DECISION, EVALUATION, PARAMS_FILE, PRIOR
from pipeline.shared.errors import ParamsError
from serving.commands.options import AsJson, Debug, print_json
from serving.shared.terminal import Console, cell, counted, print

if TYPE_CHECKING:
    from pipeline.evaluation.predictions import Predictions
    from pipeline.evaluation.run_comparison import Comparison
    from pipeline.params import Params

PREDICTIONS = EVALUATION / "predictions.parquet"
UNDECIDED = 3  # exit status of `tailor gate`
Latency = Annotated[float | None, typer.Option(metavar="MS", help="Milliseconds per image.")]
ECE_BINS = 15  # if there is no params file
HELP = "A run's folder, a git revision or DVC experiment, a published version's number, or `champion`."


def gate(
    challenger: Annotated[Path, typer.Option(help="The challenger's predictions.")] = PREDICTIONS,
    challenger_prior: Annotated[Path, typer.Option(help="The challenger's prior.")] = PRIOR,
    challenger_latency: Latency = None,
    champion: Annotated[
        Path | None, typer.Option(help="The champion's predictions.parquet; none for the first model.")
    ] = None,
    champion_prior: Annotated[
        Path | None, typer.Option(help="The champion's prior.json; needed with --champion.")
    ] = None,
    champion_latency: Latency = None,
    output: Annotated[Path, typer.Option(help="The file to write.")] = DECISION,
    params: ParamsOption = PARAMS_FILE,
    debug: Debug = False,
) -> int:
    """Decide whether the challenger replaces the champion."""
    from pipeline.evaluation.gate import decide
    from pipeline.evaluation.predictions import Contender
    from pipeline.params import load_params

    if (champion is None) != (champion_prior is None):
        raise ParamsError("--champion and --champion-prior go together; pass both, or neither for the first model")
    recipe = load_params(params)
    served = Contender(champion, champion_prior, champion_latency) if champion and champion_prior else None
    trained = Contender(challenger, challenger_prior, challenger_latency)
    decision = decide(trained, served, recipe.gate, recipe.evaluate.ece_bins, output)
    print(f"gate: {decision} → {output}")
    return UNDECIDED if decision.undecided else int(not decision.promote)


def shifted_priors(
    predictions: Annotated[Path, typer.Option(help="Predictions on the test split.")] = PREDICTIONS,
    prior: Annotated[Path, typer.Option(help="The training prior.")] = PRIOR,
    draws: Annotated[int, typer.Option(min=1, help="Test subsets per shifted set.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Write the table as CSV too.")] = None,
    debug: Debug = False,
) -> None:
    """Print accuracy on test sets with shifted class priors.

    The five sets of SADE (2022), for no adjustment, the known prior and the estimated prior.
    """
    from models.prior import log_target_prior
    from pipeline.evaluation.predictions import Contender, load_predictions
    from pipeline.evaluation.shifted_priors import SETS, shift_table
    from pipeline.shared.artifacts import as_csv, write_file

    answers = load_predictions(Contender(predictions, prior))
    # The log of the balanced probabilities equals the logits up to an offset per row, which has no effect here.
    logits = log_target_prior(answers.probabilities)
    rows = shift_table(logits, answers.labels, answers.prior.counts, draws=draws, seed=seed)
    if output:
        write_file(output, as_csv(rows))
    table = Table("accuracy", *SETS)
    for row in rows:
        table.add_row(row["prior"], *(f"{row[name]:.1%}" for name in SETS))
    Console().print(table)


def compare(
    before: Annotated[str, typer.Argument(metavar="A", help=HELP)],
    after: Annotated[str, typer.Argument(metavar="B", help="The run that is compared with A, named in the same way.")],
    prior: Annotated[
        TargetPrior, typer.Option(help="Target prior of the compared predictions.")
    ] = TargetPrior.balanced,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with charts as well.")] = None,
    classes: Annotated[
        int, typer.Option(min=0, help="Classes that the terminal shows, most surely changed first.")
    ] = 10,
    repository: RepositoryOption = None,
    params: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The recipe, for the gate's confidence and resamples and for a version's images; params.yaml if it exists.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compare run B with run A on their common test set.

    Prints paired differences with intervals, in all, by group and by class. A and B are folders of runs (a project, its
    artifacts, or a copy of predictions.parquet and prior.json), revisions whose results DVC has stored, or published
    versions, which predict the current test split in ONNX Runtime.
    """
    from pipeline.evaluation.run_comparison import as_json as content
    from pipeline.evaluation.run_comparison import compare_runs
    from pipeline.params import GateParams, load_params

    recipe = load_params(params or PARAMS_FILE) if params or PARAMS_FILE.is_file() else None
    gate = (recipe.gate if recipe else GateParams()).model_copy(update={"target_prior": prior.value})
    # Called only for a version, because folders and revisions need no repository; cached, because it may print a line.
    find_repository = cache(lambda: repository_of(repository, params or PARAMS_FILE))
    runs = [_load_predictions(name, find_repository, recipe, prior.value) for name in (before, after)]
    ece_bins = recipe.evaluate.ece_bins if recipe else ECE_BINS
    comparison = compare_runs(runs[0], runs[1], (before, after), gate, ece_bins)
    if html is not None:
        from pipeline.report import render_comparison
        from pipeline.shared.artifacts import write_file

        command = f"tailor compare {before} {after} --prior {prior.value} --html {html}"
        write_file(html, render_comparison(comparison, command))
    if as_json:
        print_json(content(comparison))
        return
    print_comparison(comparison, classes)
    if html is not None:
        print(f"page → {html}")


def _load_predictions(
    name: str, repository: Callable[[], Path], params: Params | None, target_prior: str
) -> Predictions:
    """Predictions of a run on the test set. Raises StageError or ServingError with the name of the run."""
    from pipeline.evaluation.predictions import load_predictions
    from pipeline.evaluation.runs import load_run, load_run_at_revision
    from pipeline.onnx_export.published_version import predict_with_release
    from pipeline.shared.errors import StageError

    if Path(name).is_dir():
        return load_predictions(load_run(Path(name)), target_prior)
    if name == "champion" or (name.isdecimal() and len(name) < 7):  # an abbreviated commit hash has 7 digits
        if params is None:
            raise ParamsError(
                f"{PARAMS_FILE}: no such file; pass the recipe with the version's images as --params FILE"
            )
        return predict_with_release(repository(), None if name == "champion" else int(name), params, target_prior)
    with tempfile.TemporaryDirectory(prefix="tailor-compare-") as folder:
        try:
            return load_predictions(load_run_at_revision(name, Path(folder)), target_prior)
        except StageError as error:
            raise type(error)(str(error).replace(f"{folder}/", f"{name}: ")) from None


def print_comparison(comparison: Comparison, classes: int) -> None:
    """Print the measures, and the `classes` classes with the smallest p-values."""
    console = Console()
    before, after = cell(comparison.before), cell(comparison.after)
    interval_heading = f"{100 * comparison.confidence:g} % interval"
    table = Table(
        title=f"{after} against {before}: {counted(comparison.samples, 'test image')}, {comparison.target_prior} prior"
    )
    _columns(table, "measure", before, after, "difference", interval_heading, "p")
    for name, measure in comparison.measures.items():
        table.add_row(
            f"{name} (few images)" if measure.too_few else name,
            _share(measure.champion), _share(measure.challenger), _points(measure.difference),
            _range(measure.low, measure.high), "n/a" if measure.mcnemar is None else f"{measure.mcnemar:.2g}",
        )  # fmt: skip
    console.print(table)
    for line in comparison.warnings:
        console.print(f"warning: {line}", soft_wrap=True, markup=False, highlight=False)
    changed = comparison.changed(classes)
    differing = sum(bool(row.won or row.lost) for row in comparison.classes)
    if changed:
        table = Table(
            title=f"classes: {differing:,} of {len(comparison.classes):,} changed; the {len(changed)} with the smallest q"
        )
        _columns(table, "class", "group", "training images", before, after, "difference", interval_heading, "q")
        for row in changed:
            table.add_row(
                cell(row.name), row.group, f"{row.train_count:,}", _share(row.champion), _share(row.challenger),
                _points(row.difference), _range(row.low, row.high), f"{row.q:.2g}",
            )  # fmt: skip
        console.print(table)
    console.print(
        "Differences are in percentage points, of nll in hundredths of a nat; smaller ece, nll and coverage (what sets lack of "
        "it) are better. all: mean over classes, weighted by the target prior. "
        "p: McNemar's test; q: p corrected for the number of classes. "
        "Intervals are over test images: another training seed differs by more.",
        highlight=False,
    )


def _columns(table: Table, first: str, *others: str) -> None:
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="left" if name == "group" else "right", overflow="fold")


def _share(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1%}"


def _points(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:+.1f}"


def _range(low: float | None, high: float | None) -> str:
    return "n/a" if low is None or high is None else f"{100 * low:+.1f} to {100 * high:+.1f}"
