"""`tailor gate` and `tailor shifted-priors`: the promotion decision, and accuracy under label shift."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from pipeline.commands.options import ParamsOption
from pipeline.shared.artifacts import DECISION, EVALUATION, PARAMS_FILE, PRIOR
from pipeline.shared.errors import ParamsError
from serving.commands.options import Debug
from serving.shared.terminal import Console, print

PREDICTIONS = EVALUATION / "predictions.parquet"
UNDECIDED = 3  # exit status of `tailor gate`
Latency = Annotated[float | None, typer.Option(metavar="MS", help="Milliseconds per image.")]


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
