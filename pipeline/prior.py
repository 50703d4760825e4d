"""Stage `prior`: the class prior of the training split; writes artifacts/prior.json."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from models.prior import class_prior, shot_group
from pipeline.artifacts import PRIOR, SPLIT, write_json
from pipeline.errors import DataError, ParamsError, StageError
from pipeline.params import Params
from pipeline.splits import load_classes, read_split
from pipeline.stage import stage_main


@dataclass(frozen=True)
class Prior:
    """Content of prior.json, one entry per class: name, training samples, p, log p, shot group."""

    classes: list[str]
    counts: list[int]
    p: list[float]
    log_prior: list[float]
    groups: list[str]

    def __str__(self) -> str:
        sizes = {group: self.groups.count(group) for group in ("many", "medium", "few")}
        groups = ", ".join(f"{number} {group}" for group, number in sizes.items())
        return (
            f"{len(self.classes)} classes of {max(self.counts):,} to {min(self.counts):,} samples ({groups}) → {PRIOR}"
        )


def run(params: Params, split: Path = SPLIT, output: Path = PRIOR) -> Prior:
    """Count the training labels and write counts, p, log_prior and groups. Raises DataError on a class without samples."""
    classes = load_classes(split)
    labels = read_split("train", ["label"], split).column("label").to_numpy()
    counts = np.bincount(labels, minlength=len(classes)).tolist()
    empty = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    if empty and params.prior.smoothing == 0:
        raise DataError(
            f"class {empty[0]!r} has no training samples ({len(empty)} such classes); add samples, remove the class, or "
            "set prior.smoothing above 0"
        )
    p = class_prior(counts, params.prior.smoothing)
    prior = Prior(classes, counts, p.tolist(), np.log(p).tolist(), [shot_group(count) for count in counts])
    write_json(output, asdict(prior))
    return prior


def load_prior(path: Path = PRIOR) -> Prior:
    """Read prior.json. Raises ParamsError when the stage has not run, StageError when the file is damaged."""
    try:
        return Prior(**json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ParamsError(f"{path}: {error.strerror}; run `dvc repro prior` first") from None
    except (ValueError, TypeError) as error:
        raise StageError(f"{path}: damaged ({error}); run `dvc repro -f prior`") from None


if __name__ == "__main__":
    sys.exit(stage_main(run, "Count the training labels and write the class prior."))
