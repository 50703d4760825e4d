"""Accuracy when the live class prior is not the training one: the field's five shifted test sets (SADE, 2022)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from models.label_shift import TOLERANCE, estimate_prior, mapls_concentration, total_variation
from models.prior import adjust_logits, log_target_prior, softmax
from pipeline.artifacts import EVALUATION, PRIOR, as_csv, write_file
from pipeline.errors import DataError, ParamsError, StageError
from pipeline.gate import Contender, load_answers
from pipeline.stage import explain
from serving.terminal import Console, print

EPILOG = """\
examples:
  python -m pipeline.shift_table
  python -m pipeline.shift_table --draws 100 --output artifacts/shift.csv
"""
SETS = {"forward 50": 50.0, "forward 10": 10.0, "uniform": 1.0, "backward 10": 0.1, "backward 50": 0.02}
KEPT = 0.9  # λ of MAPLS


def shifted_prior(counts: list[int], ratio: float) -> np.ndarray:
    """Target prior [C]: exponential along the classes from most to least frequent in training, first / last = ratio."""
    order = np.argsort(-np.asarray(counts), kind="stable")
    p = np.empty(len(counts))
    p[order] = ratio ** -np.linspace(0, 1, len(counts))
    return p / p.sum()


def shifted_rows(labels: np.ndarray, prior: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Rows of the largest test subset that follows the prior, drawn without replacement, every class at least once.

    Raises DataError when a class has no test sample.
    """
    available = np.bincount(labels, minlength=len(prior))
    if not available.all():
        raise DataError(
            f"class {int(available.argmin())} has no test sample; a shifted test set needs one of every class"
        )
    wanted = np.maximum((prior * (available / prior).min() + 1e-9).astype(int), 1)
    return np.concatenate(
        [generator.permutation(np.flatnonzero(labels == c))[:number] for c, number in enumerate(wanted)]
    )


def shift_table(
    logits: np.ndarray,
    labels: np.ndarray,
    counts: list[int],
    *,
    draws: int = 20,
    seed: int = 0,
    tolerance: float = TOLERANCE,
) -> list[dict[str, Any]]:
    """A row per way of adjusting: mean accuracy over `draws` test subsets of each shifted set; same seed, same table.

    logits: balanced, [N,C]; labels: [N]; counts: training samples per class. The estimates see
    the logits of the subset that they are used on, and no label; tolerance: nats that they may be short of the best. The
    last two rows are the estimates' total variation from the true prior. Raises DataError when a class has no test sample.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for name, ratio in SETS.items():
        target, generator = shifted_prior(counts, ratio), np.random.default_rng(seed)
        for _ in range(draws):
            rows = shifted_rows(labels, target, generator)
            mine, concentration = logits[rows], mapls_concentration(KEPT, len(rows), len(counts))
            p = softmax(mine)
            estimates = {
                name: estimate_prior(p, concentration=alpha, tolerance=tolerance).prior
                for name, alpha in (("EM", None), ("MAP", concentration))
            }
            priors = {"known prior": target} | {f"estimated prior ({way})": e for way, e in estimates.items()}
            logs = {way: log_target_prior(prior).astype(mine.dtype) for way, prior in priors.items()}
            answers = {"no adjustment": mine.argmax(1)}
            answers |= {way: adjust_logits(mine, log, 1.0).argmax(1) for way, log in logs.items()}
            scores = {way: float((answer == labels[rows]).mean()) for way, answer in answers.items()}
            scores |= {f"distance of {way}": float(total_variation(e, target)) for way, e in estimates.items()}
            for way, score in scores.items():
                found.setdefault(way, {}).setdefault(name, []).append(score)
    return [{"prior": way, **{name: float(np.mean(s)) for name, s in sets.items()}} for way, sets in found.items()]


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.shift_table",
        description="Accuracy on the five shifted test sets, for no adjustment, the known and the estimated prior.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    file = {"type": Path, "metavar": "FILE"}
    parser.add_argument(
        "--predictions", default=EVALUATION / "predictions.parquet", help="default: %(default)s", **file
    )
    parser.add_argument("--prior", default=PRIOR, help="default: %(default)s", **file)
    parser.add_argument("--draws", type=int, default=20, help="test subsets per shifted set (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    parser.add_argument("--output", help="write the table as CSV as well", **file)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(arguments)
    try:
        if options.draws < 1 or options.seed < 0:
            raise ParamsError(
                f"--draws is {options.draws} and --seed {options.seed}; expected at least 1 and at least 0"
            )
        answers = load_answers(Contender(options.predictions, options.prior))
        # The log of the balanced answers is their logits up to a row's offset, which no adjustment sees.
        logits = log_target_prior(answers.probabilities)
        rows = shift_table(logits, answers.labels, answers.prior.counts, draws=options.draws, seed=options.seed)
        if options.output:
            write_file(options.output, as_csv(rows))
    except (StageError, OSError) as error:
        if options.debug:
            raise
        print(f"shift_table: {explain(error)}", file=sys.stderr)
        return error.exit_code if isinstance(error, StageError) else 1
    table = Table("accuracy", *SETS)
    for row in rows:
        table.add_row(row["prior"], *(f"{row[name]:.1%}" for name in SETS))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
