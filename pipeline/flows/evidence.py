"""Run the gate and write the evidence of its decision to one folder: comparison, predictions, report, run record."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from pipeline.evaluation.gate import Decision, decide
from pipeline.evaluation.predictions import Contender, GateError
from pipeline.flows.latency import measure_latency
from pipeline.flows.records import FOLDER, now
from pipeline.params import Params
from pipeline.shared.artifacts import EVALUATION, EXPORT, PRIOR, whole_folder, write_json
from serving.promotion.history import DECISION_NAME, STORY_NAME
from serving.repository.manifest import STUDENT_NAME
from serving.repository.release import Release
from serving.shared.names import STUDENT, image_model

IDENTITY_LENGTH = 12  # leading characters of a release's identity, used as the folder name
PREDICTIONS, REPORT = "predictions.parquet", "report.html"


def write_evidence(params: Params, champion: Release | None, run_info: dict[str, Any]) -> tuple[Decision, Path]:
    """Run the gate and write its evidence. Returns the decision and the folder of evidence.

    The folder is later copied into the version's folder. run_info: why and from which data the challenger was trained,
    written as retrain.json. A missing or unreadable file of the evaluation is a refusal. Raises OSError if the folder
    cannot be written.
    """
    repository = Path(params.retrain.repository)
    graphs = [EXPORT / STUDENT_NAME]
    if champion:
        graphs.append(repository / STUDENT / str(champion.version) / "model.onnx")
    latency_ms = measure_latency(graphs) or [None, None]
    output = FOLDER / run_info["release"][:IDENTITY_LENGTH]
    with whole_folder(output) as evidence:
        error = _copy_evaluation(evidence)
        challenger = Contender(EVALUATION / PREDICTIONS, PRIOR, latency_ms[0])
        served = None
        if champion:
            version = repository / image_model(repository) / str(champion.version)  # its evidence is in its folder
            served = Contender(version / PREDICTIONS, version / PRIOR.name, latency_ms[1])
        decision = decide(challenger, served, params.gate, params.evaluate.ece_bins, evidence / DECISION_NAME, error)
        write_json(evidence / STORY_NAME, {**run_info, "decided": now().isoformat(), "promote": decision.promote})
    return decision, output


def _copy_evaluation(folder: Path) -> GateError | None:
    """Copy the existing files of the evaluation. Returns the first error, or None."""
    errors = []
    for source in (EVALUATION / PREDICTIONS, PRIOR, EVALUATION / REPORT):
        try:
            shutil.copyfile(source, folder / source.name)
        except FileNotFoundError:
            errors.append(GateError(f"{source}: no such file; run `dvc repro evaluate` first"))
        except OSError as error:
            (folder / source.name).unlink(missing_ok=True)
            errors.append(GateError(f"{source}: cannot be copied ({error.strerror})"))
    return errors[0] if errors else None
