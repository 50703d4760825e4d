"""Promotion gate: compare challenger and champion on one frozen test set, decide, and write decision.json."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from models.sample_size import ADVICE, SampleSize, sample_size
from pipeline.evaluation.comparison import Measure, compare, compare_areas, not_judged, too_few_images
from pipeline.evaluation.metrics import mean_of, per_class_accuracy
from pipeline.evaluation.predictions import Contender, GateError, Predictions, check_comparable, load_predictions
from pipeline.params import GateParams
from pipeline.segmentation.run_areas import check_comparable as check_same_images
from pipeline.segmentation.run_areas import has_areas, load_areas
from pipeline.shared.artifacts import DECISION, sha256_of, write_json
from pipeline.shared.errors import StageError, explain


@dataclass(frozen=True)
class Decision:
    """Content of decision.json. computed is False if the gate could not be computed; reasons then holds the cause.

    undecided: a rule has too few test images, and no other rule refuses; promote is then False. calibration: by contender,
    the temperature of its release, and accuracy, NLL and ECE before and after it, per shot group. not_judged: shot groups with
    too few test images for gate.ece, gate.nll or gate.coverage, which do not prevent the promotion.
    """

    promote: bool
    undecided: bool
    computed: bool
    reasons: list[str]
    measures: dict[str, Measure]
    samples: int | None
    inputs: dict[str, Any]
    params: dict[str, Any]
    calibration: dict[str, Any] = field(default_factory=dict)
    not_judged: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.verdict}: {'; '.join(self.reasons + [f'not judged: {line}' for line in self.not_judged])}"

    @property
    def verdict(self) -> str:
        """promote, refuse or not decided."""
        return "promote" if self.promote else "not decided" if self.undecided else "refuse"


def decide(
    challenger: Contender,
    champion: Contender | None,
    params: GateParams,
    ece_bins: int,
    output: Path | None = DECISION,
    copy_error: GateError | None = None,
) -> Decision:
    """Decide whether to promote the challenger, and write the decision to `output`; None writes no file.

    Without a champion the challenger must reach gate.floor. A gate that cannot be computed is a refusal with the
    reason, not an exception: missing or damaged files, different classes or test sets, a latency that a rule needs and
    that was not measured, or `copy_error`, an error of the caller that copied the files. Raises OSError if the
    decision cannot be written.
    """
    inputs = {"challenger": _input_record(challenger), "champion": _input_record(champion)}
    samples, measures, undecided, calibration = None, {}, False, {}
    try:
        if copy_error is not None:
            raise copy_error
        if has_areas(challenger.predictions):
            areas = load_areas(challenger.predictions, challenger.prior, params.target_prior)
            samples = len(areas.sample_ids)
            if champion is None:
                score = float(
                    areas.mean_iou(np.ones(len(areas.prior.classes), dtype=bool))(np.arange(samples)[None])[0]
                )
                promote, undecided, reasons = _reaches_floor("mIoU", score, SampleSize(samples, samples), params)
            else:
                champion_areas = load_areas(champion.predictions, champion.prior, params.target_prior)
                check_same_images(areas, champion_areas)
                measures = compare_areas(areas, champion_areas, params)
        else:
            predictions = load_predictions(challenger, params.target_prior)
            samples = len(predictions.labels)
            calibration = {"challenger": predictions.calibration}
            if champion is None:
                promote, undecided, reasons = _decide_first_model(predictions, params)
            else:
                champion_predictions = load_predictions(champion, params.target_prior)
                check_comparable(predictions, champion_predictions)
                calibration["champion"] = champion_predictions.calibration
                measures = compare(predictions, champion_predictions, params, ece_bins)
        if champion is not None:
            measures["latency_ms"] = _latency(challenger.latency_ms, champion.latency_ms, params)
            reasons = [_refusal_reason(name, measure) for name, measure in measures.items() if measure.passed is False]
            few = too_few_images(measures)
            promote, undecided = not reasons and not few, bool(few) and not reasons
            reasons = reasons or few or ["not worse than the champion by any rule of params.gate"]
        computed = True
    except (StageError, OSError) as error:
        promote, computed, reasons, measures = False, False, [f"cannot be computed: {explain(error)}"], {}
    decision = Decision(
        promote, undecided, computed, reasons, measures, samples, inputs, params.model_dump(mode="json"), calibration,
        not_judged(measures),
    )  # fmt: skip
    if output is not None:
        write_json(output, asdict(decision))
    return decision


def _latency(challenger: float | None, champion: float | None, params: GateParams) -> Measure:
    ratio = params.latency_ratio
    if ratio is not None and (challenger is None or champion is None):
        raise GateError("gate.latency_ratio is set, but the latency of a contender was not measured; pass both")
    passed = None if ratio is None else challenger <= ratio * champion
    difference = None if challenger is None or champion is None else challenger - champion
    rule = "none" if ratio is None else "ratio"
    return Measure(champion, challenger, difference, None, None, None, rule, ratio or 0.0, passed)


def _decide_first_model(predictions: Predictions, params: GateParams) -> tuple[bool, bool, list[str]]:
    """Decide on the first model: (whether it reaches the floor, whether the test images are too few, the reasons)."""
    labels, predicted = predictions.labels, predictions.probabilities.argmax(1)
    score = mean_of(per_class_accuracy(predicted, labels, len(predictions.prior.classes))) or 0.0
    return _reaches_floor("balanced accuracy", score, sample_size(np.bincount(labels)), params)


def _reaches_floor(name: str, score: float, size: SampleSize, params: GateParams) -> tuple[bool, bool, list[str]]:
    text = f"first model, {name} {score:.1%}"
    if size.too_few and params.floor > 0:
        return False, True, [f"{text} of {size}; {ADVICE}, or set gate.floor: 0"]
    if score >= params.floor:
        return True, False, [f"{text}, at least gate.floor {params.floor:.1%}"]
    return False, False, [f"{text}, below gate.floor {params.floor:.1%}"]


def _refusal_reason(name: str, measure: Measure) -> str:
    within = "" if measure.low is None else f", interval {measure.low:+.4f} to {measure.high:+.4f}"
    rule = f"rule {measure.rule}, margin {measure.margin:g}"
    return f"{name} {measure.champion:.4f} → {measure.challenger:.4f} ({measure.difference:+.4f}{within}; {rule})"


def _input_record(contender: Contender | None) -> dict[str, Any] | None:
    if contender is None:
        return None
    path, sha256 = contender.predictions, None
    with contextlib.suppress(OSError):  # load_predictions reports the unreadable file as a reason of the decision
        sha256 = sha256_of(path)
    return {
        "predictions": str(path), "sha256": sha256, "prior": str(contender.prior), "latency_ms": contender.latency_ms,
    }  # fmt: skip
