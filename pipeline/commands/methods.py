"""`tailor methods` and `tailor methods compare`: list the methods, and compare some of them on the project's data set."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from pipeline.commands.options import ParamsOption
from pipeline.methods.catalogue import METHODS, find_methods
from pipeline.shared.artifacts import PARAMS_FILE, write_file, write_json
from pipeline.shared.errors import ParamsError, StageError
from serving.commands.options import AsJson, Debug, print_json
from serving.shared.terminal import Console, counted, print

if TYPE_CHECKING:
    from pipeline.methods.comparison import Comparison, Project

WIDTH = 100  # columns of the list, at least
CAPTION = (
    "step: images through a network for each image of a batch, with a gradient + without; "
    "a network with several experts counts once. licence: of the authors' code; "
    "Tailor's is Apache-2.0."
)
SECONDS = {"s": 1, "m": 60, "h": 3600}
OUTPUT, RESULT = Path("comparison"), "comparison.json"
COMPARE = """\b
Examples:
  tailor methods compare --methods cross_entropy,gml,crt --seeds 3
  tailor methods compare --methods all --seeds 5 --budget 30m
  tailor methods compare --methods project,gml,my-recipe.yaml --against project
  tailor methods compare --methods balanced_softmax,bcl,gml --equal-cost gml

`all` is every listed method that applies to the project, `project` is params.yaml as it is, and a name that ends in .yaml is
an overlay of your own. After an interruption the same command resumes. Exit status 1 if a run failed."""

app = typer.Typer(
    rich_markup_mode=None,
    invoke_without_command=True,
    help="List the training methods, or compare them on your data.",
    epilog="Example: tailor methods, then: tailor methods compare --methods cross_entropy,gml --seeds 3",
)


@app.callback()
def methods(context: typer.Context, as_json: AsJson = False, debug: Debug = False) -> None:
    """List the methods: paper, what each changes, cost of a step, licence of the authors' code.

    Apply one with `tailor recipe recipes/methods/NAME.yaml`.
    """
    if context.invoked_subcommand:
        return
    if as_json:
        print_json([{**asdict(each), "recipe": str(each.overlay), "step": each.step} for each in METHODS])
    else:
        Console(width=max(Console().width, WIDTH)).print(methods_table())


def methods_table() -> Table:
    """Return the table that the command prints, with the methods of a kind under its name."""
    table = Table(box=None, pad_edge=False, caption=CAPTION, caption_justify="left")
    for column in ("method", "step", "licence", "paper", "changes"):
        table.add_column(column, no_wrap=column in ("method", "step", "licence"))
    for kind in dict.fromkeys(each.kind for each in METHODS):
        table.add_row(f"[bold]{kind}")
        for each in METHODS:
            if each.kind == kind:
                table.add_row(f"  {each.name}", each.step, each.licence, each.paper, each.changes)
    return table


@app.command(epilog=COMPARE)
def compare(
    methods: Annotated[str, typer.Option(metavar="NAMES", help="Methods, separated by commas; or all.")],
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Number of seeds, from params.seed on.")] = 3,
    against: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Method that the others are compared with; the first if not given."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="90s, 30m or 2h: start no run that would end later, by the time of finished runs; no limit if not given.",
        ),
    ] = None,
    equal_cost: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Train each method again, with as many epochs as cost what NAME costs."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the networks, the page and the JSON.")] = OUTPUT,
    params: ParamsOption = PARAMS_FILE,
    debug: Debug = False,
) -> int:
    """Train methods on the project's data, and compare them.

    Uses params.yaml, the split, the class prior and stored features, and writes nothing to artifacts/. Writes
    comparison.html and comparison.json after each run. Judges on the test split at the last epoch and chooses nothing on it.
    """
    from pipeline.methods.comparison import Comparison, compare_methods, load_project
    from pipeline.methods.page import as_json, missing_lines, render_methods
    from pipeline.params import load_params

    given = [name.strip() for name in methods.split(",") if name.strip()]
    chosen, limit = find_methods(given), budget_seconds(budget)
    named = [each.name for each in chosen]
    for option, name in (("--against", against), ("--equal-cost", equal_cost)):
        if name and name not in named:
            raise ParamsError(f"{option} is {name!r}; expected one of --methods: {', '.join(named)}")
    reference = next((each for each in chosen if each.name == against), chosen[0])
    recipe = load_params(params)
    if equal_cost and recipe.student.tune != "none":
        raise ParamsError(f"--equal-cost: the cost is not known with student.tune {recipe.student.tune}; leave it out")
    project = load_project(recipe)
    comparison = Comparison(project, chosen, [recipe.seed + number for number in range(seeds)], equal_cost)
    leave_out(comparison, project, given={*given, against or "", equal_cost or ""})
    if reference not in comparison.methods:
        reference = comparison.methods[0]
    options = {
        "--methods": methods, "--seeds": seeds, "--against": reference.name, "--budget": budget, "--equal-cost": equal_cost,
        "--output": None if output == OUTPUT else output, "--params": None if params == PARAMS_FILE else params,
    }  # fmt: skip
    given_options = (f"{name} {shlex.quote(str(value))}" for name, value in options.items() if value is not None)
    command = " ".join(["tailor methods compare", *given_options])

    def save() -> None:
        write_json(output / RESULT, as_json(comparison, reference.name, command))
        write_file(output / "comparison.html", render_methods(comparison, reference.name, command))

    with locked(output):
        compare_methods(comparison, output, limit, lambda line: print(line, flush=True), save)
        save()
    for line in missing_lines(comparison.left_out):
        print(f"left out: {line}")
    for line in missing_lines(comparison.missing):
        print(f"missing: {line}")
    print(f"methods compare: {counted(comparison.done, 'run')} → {output / 'comparison.html'}")
    return int(comparison.failed)


def budget_seconds(text: str | None) -> float | None:
    """Seconds of a budget such as 90s, 30m or 2h; None for no budget. Raises ParamsError for other text."""
    if text is None:
        return None
    given = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if not given or float(given[1]) == 0:
        raise ParamsError(f"--budget is {text!r}; expected a time above 0 such as 90s, 30m or 2h")
    return float(given[1]) * SECONDS[given[2]]


def leave_out(comparison: Comparison, project: Project, given: set[str]) -> None:
    """Remove the methods that do not apply to the project and record why.

    Raises ParamsError for a method that the caller named, and if none is left.
    """
    from pipeline.methods.comparison import Missing, check_method

    for method in list(comparison.methods):
        try:
            check_method(method, project)
        except ParamsError as error:
            if method.recipe or method.name in given:
                raise
            comparison.methods.remove(method)
            comparison.left_out.append(Missing(method.name, None, str(error).partition(": ")[2]))
    if not comparison.methods:
        raise ParamsError("--methods: no method applies to this project")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create a folder that git ignores, and hold its lock.

    Raises ParamsError if it is a file or holds other files than those of a comparison, StageError if another comparison
    holds it.
    """
    from filelock import FileLock, Timeout

    from pipeline.methods.comparison import NETWORKS

    wanted = "expected a new or empty folder, or that of an earlier comparison"
    if folder.exists() and not folder.is_dir():
        raise ParamsError(f"--output is {folder}, a file; {wanted}")
    folder.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in folder.iterdir()}
    if names - {".gitignore", ".lock"} and not names & {NETWORKS, RESULT}:
        raise ParamsError(f"--output is {folder}, which holds other files; {wanted}")
    if not names:
        (folder / ".gitignore").write_text("*\n", encoding="utf-8")
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise StageError(f"{folder}: another comparison writes to it; wait for it or give another --output") from None
