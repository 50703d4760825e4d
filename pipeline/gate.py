"""The gate: does the challenger take the champion's place? Both on one frozen test set; writes decision.json."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from pipeline.artifacts import EVALUATION, PRIOR, sha256_of_file, write_json
from pipeline.errors import ParamsError, StageError
from pipeline.metrics import GROUPS, answers, expected_calibration_error, mean_of, per_class_accuracy
from pipeline.params import PARAMS_FILE, GateParams, load_params
from pipeline.prior import Prior, load_prior
from pipeline.stage import explain

EPILOG = """\
examples:
  python -m pipeline.gate                                               the first model: is it good enough?
  python -m pipeline.gate --champion versions/7/predictions.parquet --champion-prior versions/7/prior.json
Exit code 0: promote. 1: refuse, which includes a gate that cannot be computed. 2: misuse.
"""
DECISION = Path("artifacts/decision.json")


class GateError(StageError):
    """The gate cannot be computed, which is a refusal."""


@dataclass(frozen=True)
class Contender:
    """A model at the gate: the two files that describe it, and milliseconds per image in ONNX Runtime if measured."""

    predictions: Path
    prior: Path
    latency_ms: float | None = None


@dataclass(frozen=True)
class Measure:
    """One comparison. difference is challenger - champion, low and high its bootstrap interval; None where there is none.

    mcnemar: two-sided exact p-value over the measure's samples. passed: None where the rule is off.
    """

    champion: float | None
    challenger: float | None
    difference: float | None
    low: float | None
    high: float | None
    mcnemar: float | None
    rule: str
    margin: float
    passed: bool | None


@dataclass(frozen=True)
class Decision:
    """Content of decision.json. computed is False when the gate could not be computed; reasons then says why."""

    promote: bool
    computed: bool
    reasons: list[str]
    measures: dict[str, Measure]
    samples: int | None
    inputs: dict[str, Any]
    params: dict[str, Any]

    def __str__(self) -> str:
        return f"{'promote' if self.promote else 'refuse'}: {'; '.join(self.reasons)}"


@dataclass(frozen=True)
class Answers:
    """What a contender says of the test set, in the order of the sample ids."""

    sample_ids: list[str]
    labels: np.ndarray
    probabilities: np.ndarray
    prior: Prior


def decide(
    challenger: Contender, champion: Contender | None, params: GateParams, ece_bins: int, output: Path | None = DECISION
) -> Decision:
    """Compare, decide and write the decision to `output`. Without a champion the challenger must reach the floor.

    Whatever keeps the gate from being computed is a refusal that names it, never an exception: missing or damaged
    files, other classes, another test set, a latency that a rule needs and nobody measured.
    """
    named = {"challenger": challenger, "champion": champion}
    inputs = {name: _describe(contender) for name, contender in named.items()}
    samples, measures = None, {}
    try:
        mine = load_answers(challenger, params.target_prior)
        samples = len(mine.labels)
        if champion is None:
            promote, reasons = _first(mine, params)
        else:
            theirs = load_answers(champion, params.target_prior)
            check_comparable(mine, theirs)
            measures = compare(mine, theirs, params, ece_bins)
            measures["latency_ms"] = _latency(challenger.latency_ms, champion.latency_ms, params)
            reasons = [_say(name, measure) for name, measure in measures.items() if measure.passed is False]
            promote = not reasons
            reasons = reasons or ["not worse than the champion by any rule of params.gate"]
        computed = True
    except (StageError, OSError) as error:
        promote, computed, reasons, measures = False, False, [f"cannot be computed: {explain(error)}"], {}
    decision = Decision(promote, computed, reasons, measures, samples, inputs, params.model_dump(mode="json"))
    if output is not None:
        write_json(output, asdict(decision))
    return decision


def load_answers(contender: Contender, target_prior: str = "balanced") -> Answers:
    """A contender's answers for the target prior. Raises StageError naming the file and what is wrong with it."""
    path, prior = contender.predictions, load_prior(contender.prior)
    try:
        table = pyarrow.parquet.read_table(path, columns=["sample_id", "label", "logits"])
        logits = np.array(table.column("logits").to_pylist(), dtype=np.float64)
    except FileNotFoundError:
        raise GateError(f"{path}: no such file; run `dvc repro evaluate` first") from None
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        raise GateError(f"{path}: damaged ({str(error).splitlines()[0]}); run `dvc repro -f evaluate`") from None
    classes = len(prior.classes)
    if logits.ndim != 2 or not len(logits) or logits.shape[1] != classes:
        raise GateError(f"{path}: logits have shape {list(logits.shape)}; {contender.prior} has {classes} classes")
    if not np.all(np.isfinite(logits)):
        raise GateError(f"{path}: has a logit that is not finite")
    ids, labels = table.column("sample_id").to_pylist(), table.column("label").to_numpy()
    if len(set(ids)) != len(ids):
        raise GateError(f"{path}: a sample id stands twice; expected each once")
    if labels.min() < 0 or labels.max() >= classes:
        raise GateError(f"{path}: has the label {labels.max()}; expected 0 to {classes - 1}")
    order = np.argsort(np.array(ids))
    strength = 1.0 if target_prior == "train" else 0.0
    found = answers(logits[order], np.array(prior.log_prior), strength)
    return Answers([ids[i] for i in order], labels[order], found, prior)


def check_comparable(challenger: Answers, champion: Answers) -> None:
    """Raise GateError unless both have the same classes in the same order and the same samples under the same labels."""
    if challenger.prior.classes != champion.prior.classes:
        other = sorted(set(challenger.prior.classes) ^ set(champion.prior.classes))
        which = f"{other[0]!r} is a class of one alone" if other else "their order differs"
        raise GateError(f"challenger and champion have other classes: {which}; compare models of the same classes")
    if challenger.sample_ids != champion.sample_ids:
        other = sorted(set(challenger.sample_ids) ^ set(champion.sample_ids))
        raise GateError(
            f"challenger and champion were tested on other samples ({len(other)} are in one set alone, first {other[0]!r}); "
            "evaluate both on the same frozen test set"
        )
    if np.any(challenger.labels != champion.labels):
        first = int(np.flatnonzero(challenger.labels != champion.labels)[0])
        raise GateError(f"sample {challenger.sample_ids[first]!r} has two labels; evaluate both on the same test set")


def compare(challenger: Answers, champion: Answers, params: GateParams, ece_bins: int) -> dict[str, Measure]:
    """Accuracy on all, many, medium and few, and the calibration error, with paired intervals and exact McNemar tests.

    The champion's groups count: few are the classes that were few when it was trained. many, medium and few are means of
    class accuracies, as `evaluate` has them, so a sample counts by one over its class's size.
    """
    labels, classes = challenger.labels, len(champion.prior.classes)
    right = [a.probabilities.argmax(1) == labels for a in (champion, challenger)]
    group = np.array(champion.prior.groups)[labels]
    counts = np.bincount(labels, minlength=classes)
    found = {"all": _accuracy(*right, np.full(len(labels), 1 / len(labels)), params, "all")}
    for name in GROUPS:
        inside = group == name
        share = 1 / counts[labels[inside]]
        weights = share / share.sum() if inside.any() else share
        found[name] = _accuracy(right[0][inside], right[1][inside], weights, params, name)
    found["ece"] = _calibration(champion.probabilities, challenger.probabilities, labels, params, ece_bins)
    return found


def _accuracy(
    champion: np.ndarray, challenger: np.ndarray, weights: np.ndarray, params: GateParams, name: str
) -> Measure:
    rule = getattr(params, name)
    if not len(weights):
        # A group without test samples: nothing can be said of it, and a rule on it has nothing to refuse.
        return Measure(None, None, None, None, None, None, rule.rule, rule.margin, None)
    change = (challenger.astype(np.float64) - champion) * weights * len(weights)
    low, high = paired_interval(lambda index: change[index].mean(axis=-1), len(change), params)
    p = mcnemar(champion, challenger)
    difference = float(change.mean())
    passed = _judge(rule, difference, low, high, p, 1 - params.confidence)
    before, after = float(weights @ champion), float(weights @ challenger)
    return Measure(before, after, difference, low, high, p, rule.rule, rule.margin, passed)


def _calibration(
    champion: np.ndarray, challenger: np.ndarray, labels: np.ndarray, params: GateParams, bins: int
) -> Measure:
    rule = params.ece
    pair = [calibration_of(p, labels, bins) for p in (champion, challenger)]
    low, high = paired_interval(lambda index: pair[1](index) - pair[0](index), len(labels), params)
    before, after = (expected_calibration_error(p, labels, bins) for p in (champion, challenger))
    # A larger error is worse: the rules ask for what must not fall.
    passed = _judge(rule, before - after, -high, -low, None, 1 - params.confidence)
    return Measure(before, after, after - before, low, high, None, rule.rule, rule.margin, passed)


def calibration_of(probabilities: np.ndarray, labels: np.ndarray, bins: int) -> Callable[[np.ndarray], np.ndarray]:
    """The calibration error of resampled rows: index [..., N] → ECE [...], as `expected_calibration_error` has it."""
    confidence = probabilities.max(axis=1)
    gap = (probabilities.argmax(axis=1) == labels) - confidence
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)

    def error(index: np.ndarray) -> np.ndarray:
        rows = np.atleast_2d(index)
        bin_of = place[rows] + bins * np.arange(len(rows))[:, None]
        sums = np.bincount(bin_of.ravel(), gap[rows].ravel(), minlength=bins * len(rows)).reshape(len(rows), bins)
        return (np.abs(sums).sum(axis=1) / rows.shape[1]).reshape(index.shape[:-1])

    return error


def paired_interval(
    statistic: Callable[[np.ndarray], np.ndarray], samples: int, params: GateParams
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic of sample indices; the same draws for the same seed and size."""
    from scipy.stats import bootstrap

    index = np.arange(samples)
    if samples < 2:  # one sample shows no noise: nothing is beyond it
        return -1.0, 1.0
    found = bootstrap(
        (index,), lambda drawn, axis: statistic(drawn), vectorized=True, method="percentile", axis=-1,  # noqa: ARG005
        n_resamples=params.resamples, batch=max(1, 4_000_000 // samples), confidence_level=params.confidence,
        rng=np.random.default_rng(params.seed),
    )  # fmt: skip
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def mcnemar(champion: np.ndarray, challenger: np.ndarray) -> float:
    """Exact two-sided McNemar p-value: are the samples that one alone gets right split evenly? 1 when there are none."""
    from scipy.stats import binomtest

    lost, won = int((champion & ~challenger).sum()), int((challenger & ~champion).sum())
    return float(binomtest(won, lost + won).pvalue) if lost + won else 1.0


def _judge(rule: Any, difference: float, low: float, high: float, p: float | None, alpha: float) -> bool | None:
    if rule.rule == "off":
        return None
    if rule.rule == "estimate":
        return difference >= -rule.margin - 1e-12  # a sum of weights is exact to rounding
    if rule.rule == "proven":
        return low >= -rule.margin - 1e-12
    # beyond_noise: both must say so, as the bootstrap is too sure of itself where few samples differ.
    return not (high < -rule.margin and (p is None or p <= alpha))


def _latency(challenger: float | None, champion: float | None, params: GateParams) -> Measure:
    ratio = params.latency_ratio
    if ratio is not None and (challenger is None or champion is None):
        raise GateError("gate.latency_ratio is set, but the latency of a contender was not measured; pass both")
    passed = None if ratio is None else challenger <= ratio * champion
    known = challenger is not None and champion is not None
    difference = challenger - champion if known else None
    rule = "off" if ratio is None else "ratio"
    return Measure(champion, challenger, difference, None, None, None, rule, ratio or 0.0, passed)


def _first(mine: Answers, params: GateParams) -> tuple[bool, list[str]]:
    predicted = mine.probabilities.argmax(1)
    score = mean_of(per_class_accuracy(predicted, mine.labels, len(mine.prior.classes))) or 0.0
    said = f"first model, balanced accuracy {score:.1%}"
    if score >= params.floor:
        return True, [f"{said}, at least gate.floor {params.floor:.1%}"]
    return False, [f"{said}, below gate.floor {params.floor:.1%}"]


def _say(name: str, measure: Measure) -> str:
    within = "" if measure.low is None else f", interval {measure.low:+.4f} to {measure.high:+.4f}"
    rule = f"rule {measure.rule}, margin {measure.margin:g}"
    return f"{name} {measure.champion:.4f} → {measure.challenger:.4f} ({measure.difference:+.4f}{within}; {rule})"


def _describe(contender: Contender | None) -> dict[str, Any] | None:
    if contender is None:
        return None
    path = contender.predictions
    digest = sha256_of_file(path) if path.is_file() else None
    return {
        "predictions": str(path),
        "sha256": digest,
        "prior": str(contender.prior),
        "latency_ms": contender.latency_ms,
    }


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.gate",
        description="Decide whether the challenger takes the champion's place.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    file = {"type": Path, "metavar": "FILE"}
    parser.add_argument("--challenger", default=EVALUATION / "predictions.parquet", help="default: %(default)s", **file)
    parser.add_argument("--challenger-prior", default=PRIOR, help="default: %(default)s", **file)
    parser.add_argument("--challenger-latency", type=float, metavar="MS", help="milliseconds per image")
    parser.add_argument("--champion", help="its predictions.parquet; none for the first model", **file)
    parser.add_argument("--champion-prior", help="its prior.json; needed with --champion", **file)
    parser.add_argument("--champion-latency", type=float, metavar="MS", help="milliseconds per image")
    parser.add_argument("--output", default=DECISION, help="default: %(default)s", **file)
    parser.add_argument("--params", type=Path, default=PARAMS_FILE, help="the recipe (default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(arguments)
    try:
        if (options.champion is None) != (options.champion_prior is None):
            raise ParamsError("--champion and --champion-prior go together; pass both, or neither for the first model")
        params = load_params(options.params)
        challenger = Contender(options.challenger, options.challenger_prior, options.challenger_latency)
        champion = options.champion and Contender(options.champion, options.champion_prior, options.champion_latency)
        decision = decide(challenger, champion, params.gate, params.evaluate.ece_bins, options.output)
    except (StageError, OSError) as error:
        if options.debug:
            raise
        print(f"gate: {explain(error)}", file=sys.stderr)
        return error.exit_code if isinstance(error, StageError) else 1
    print(f"gate: {decision} → {options.output}")
    return 0 if decision.promote else 1


if __name__ == "__main__":
    sys.exit(main())
