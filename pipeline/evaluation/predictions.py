"""Read a run's test predictions from predictions.parquet, and check that two runs are comparable."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from models.prior import class_key
from pipeline.data.class_prior import Prior, load_prior
from pipeline.evaluation.metrics import answers
from pipeline.shared.errors import StageError
from serving.shared.bounded_parquet import MemoryLimit, TooLargeError, read_column

LIMIT = MemoryLimit(1024)  # 24,000 test images of 8,000 classes take 760 MiB


class GateError(StageError):
    """The gate cannot be computed; the decision is then a refusal."""


@dataclass(frozen=True)
class Contender:
    """A model that is compared: its predictions.parquet and prior.json, and its latency.

    latency_ms: milliseconds per image in ONNX Runtime; None if not measured.
    """

    predictions: Path
    prior: Path
    latency_ms: float | None = None


def load_answers(contender: Contender, target_prior: str = "balanced") -> Answers:
    """Read the predictions of a contender, adjusted for the target prior, in the order of the sample ids.

    Raises GateError, or StageError for the prior, with the file and the problem.
    """
    path, prior = contender.predictions, load_prior(contender.prior)
    try:
        with path.open("rb") as stream, pyarrow.parquet.ParquetFile(path) as file:
            columns = (read_column(file, name, LIMIT, stream=stream) for name in ("sample_id", "label", "logits"))
            sample_ids, sample_labels, rows = columns
        logits = np.array(rows.to_pylist(), dtype=np.float64)
    except FileNotFoundError:
        raise GateError(f"{path}: no such file; run `dvc repro evaluate` first") from None
    except TooLargeError as error:
        raise GateError(f"{path}: {error}") from None
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        raise GateError(f"{path}: damaged ({str(error).splitlines()[0]}); run `dvc repro -f evaluate`") from None
    classes = len(prior.classes)
    if logits.ndim != 2 or not len(logits) or logits.shape[1] != classes:
        raise GateError(f"{path}: logits have shape {list(logits.shape)}; {contender.prior} has {classes} classes")
    if not np.all(np.isfinite(logits)):
        raise GateError(f"{path}: has a logit that is not finite")
    ids, labels = sample_ids.to_pylist(), sample_labels.to_numpy()
    if len(set(ids)) != len(ids):
        raise GateError(f"{path}: a sample id stands twice; expected each once")
    if labels.min() < 0 or labels.max() >= classes:
        raise GateError(f"{path}: has the label {labels.max()}; expected 0 to {classes - 1}")
    order = np.argsort(np.array(ids))
    strength = 1.0 if target_prior == "train" else 0.0
    found = answers(logits[order], np.array(prior.log_prior), strength)
    return Answers([ids[i] for i in order], labels[order], found, prior)


def check_comparable(challenger: Answers, champion: Answers, names: str = "challenger and champion") -> None:
    """Raise GateError unless both have the same classes in the same order and the same samples with the same labels."""
    mine, theirs = ([class_key(name) for name in answers.prior.classes] for answers in (challenger, champion))
    if mine != theirs:
        other = sorted(set(mine) ^ set(theirs))
        which = f"{other[0]!r} is a class of one alone" if other else "their order differs"
        raise GateError(f"{names} have other classes: {which}; compare models of the same classes")
    if challenger.sample_ids != champion.sample_ids:
        other = sorted(set(challenger.sample_ids) ^ set(champion.sample_ids))
        raise GateError(
            f"{names} were tested on other samples ({len(other)} are in one set alone, first {other[0]!r}); "
            "evaluate both on the same frozen test set"
        )
    if np.any(challenger.labels != champion.labels):
        first = int(np.flatnonzero(challenger.labels != champion.labels)[0])
        raise GateError(f"sample {challenger.sample_ids[first]!r} has two labels; evaluate both on the same test set")


@dataclass(frozen=True)
class Answers:
    """Predictions of a contender on the test set, in the order of the sample ids.

    labels: int [N]; probabilities: float [N,C], for one target prior.
    """

    sample_ids: list[str]
    labels: np.ndarray
    probabilities: np.ndarray
    prior: Prior
