"""Run the gate and write the evidence of its decision to one folder: comparison, predictions, report, run record."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from pipeline.evaluation.gate import Decision, decide
from pipeline.evaluation.predictions import Contender, GateError
from pipeline.flows.latency import latencies
from pipeline.flows.records import FOLDER, now
from pipeline.params import Params
from pipeline.shared.artifacts import EVALUATION, EXPORT, PRIOR, whole_folder, write_json
from serving.promotion.history import DECISION_NAME, STORY_NAME
from serving.repository.manifest import STUDENT_NAME
from serving.repository.release import Release
from serving.shared.names import CLASSIFIER, STUDENT

IDENTITY_LENGTH = 12  # leading characters of a release's identity, used as the folder name
PREDICTIONS, PRIOR_NAME, REPORT = "predictions.parquet", "prior.json", "report.html"


def gather(
    params: Params, champion: Release | None, story: dict[str, Any], folder: Path = FOLDER
) -> tuple[Decision, Path]:
    """Run the gate and write its evidence. Returns the decision and the folder of evidence.

    The folder is later copied into the version's folder. story: why and from which data the challenger was trained,
    written as retrain.json. A missing or unreadable file of the evaluation is a refusal. Raises OSError if the folder
    cannot be written.
    """
    repository = Path(params.retrain.repository)
    graphs = [EXPORT / STUDENT_NAME]
    if champion:
        graphs.append(repository / STUDENT / str(champion.version) / "model.onnx")
    measured = latencies(graphs) or [None, None]
    output = folder / story["release"][:IDENTITY_LENGTH]
    with whole_folder(output) as kept:
        fault = _copy_evaluation(kept)
        challenger = Contender(EVALUATION / PREDICTIONS, PRIOR, measured[0])
        theirs = _contender(repository / CLASSIFIER / str(champion.version), measured[1]) if champion else None
        decision = decide(challenger, theirs, params.gate, params.evaluate.ece_bins, kept / DECISION_NAME, fault)
        write_json(kept / STORY_NAME, {**story, "decided": now().isoformat(), "promote": decision.promote})
    return decision, output


def _contender(folder: Path, latency_ms: float | None) -> Contender:
    """The champion as a Contender, from the evidence in its version's folder."""
    return Contender(folder / PREDICTIONS, folder / PRIOR_NAME, latency_ms)


def _copy_evaluation(kept: Path) -> GateError | None:
    """Copy the existing files of the evaluation. Returns the first error, or None."""
    faults = []
    for source, name in (
        (EVALUATION / PREDICTIONS, PREDICTIONS),
        (PRIOR, PRIOR_NAME),
        (EVALUATION / REPORT, REPORT),
    ):
        try:
            shutil.copyfile(source, kept / name)
        except FileNotFoundError:
            faults.append(GateError(f"{source}: no such file; run `dvc repro evaluate` first"))
        except OSError as error:
            (kept / name).unlink(missing_ok=True)
            faults.append(GateError(f"{source}: cannot be copied ({error.strerror})"))
    return faults[0] if faults else None
