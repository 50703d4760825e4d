"""The files of a run that say what it answers: predictions.parquet and prior.json, wherever its folder has them."""

from __future__ import annotations

from pathlib import Path

from pipeline.artifacts import EVALUATION, PRIOR
from pipeline.errors import ParamsError
from pipeline.gate import Contender

PREDICTIONS = "predictions.parquet"


def contender_of(folder: Path) -> Contender:
    """The two files of a run's folder: a project, its artifacts/, its artifacts/evaluation/, or a copy of both files.

    Raises ParamsError naming what is missing.
    """
    places = [(folder, folder), (folder, folder.parent), (folder / EVALUATION.name, folder)]
    places.append((folder / EVALUATION, folder / PRIOR.parent))
    for evaluation, priors in places:
        if (evaluation / PREDICTIONS).is_file() and (priors / PRIOR.name).is_file():
            return Contender(evaluation / PREDICTIONS, priors / PRIOR.name)
    if not folder.is_dir():
        raise ParamsError(f"{folder}: no such folder; expected a run with {PREDICTIONS} and {PRIOR.name}")
    found = next((evaluation / PREDICTIONS for evaluation, _ in places if (evaluation / PREDICTIONS).is_file()), None)
    if found:
        raise ParamsError(f"{found}: has no {PRIOR.name} beside or above it; copy the run's {PRIOR} there")
    raise ParamsError(
        f"{folder}: holds no {PREDICTIONS}; expected the folder of a run that `dvc repro evaluate` finished"
    )
