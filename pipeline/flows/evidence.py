"""What a decision rests on, in one folder: the comparison, the answers that were compared, the report, and the story."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from pipeline.artifacts import EVALUATION, EXPORT, PRIOR, whole_folder, write_json
from pipeline.flows import publish as releases
from pipeline.flows.latency import latencies
from pipeline.flows.records import FOLDER, now
from pipeline.gate import Contender, Decision, GateError, decide
from pipeline.params import Params
from serving.manifest import STUDENT_NAME

IDENTITY_LENGTH = 12  # characters of a release's identity that name its folder


def gather(
    params: Params, champion: releases.Champion | None, story: dict[str, Any], folder: Path = FOLDER
) -> tuple[Decision, Path]:
    """Hold the gate and keep what it rests on; the decision, and the folder that goes into the version's own.

    story: why and from what the challenger was made, written beside as retrain.json. A file of the evaluation that is
    missing or cannot be read is a refusal. Raises OSError where the folder cannot be written.
    """
    repository = Path(params.retrain.repository)
    graphs = [EXPORT / STUDENT_NAME, *([champion.graph(repository)] if champion else [])]
    measured = latencies(graphs) or [None, None]
    output = folder / story["release"][:IDENTITY_LENGTH]
    with whole_folder(output) as kept:
        fault = _copy_evaluation(kept)
        challenger = Contender(EVALUATION / releases.PREDICTIONS, PRIOR, measured[0])
        theirs = champion.contender(measured[1]) if champion else None
        decision = decide(challenger, theirs, params.gate, params.evaluate.ece_bins, kept / releases.DECISION, fault)
        write_json(kept / releases.STORY, {**story, "decided": now().isoformat(), "promote": decision.promote})
    return decision, output


def _copy_evaluation(kept: Path) -> GateError | None:
    """Copy what the evaluation left, as far as that can be done; the first error, None where there was none."""
    faults = []
    for source, name in (
        (EVALUATION / releases.PREDICTIONS, releases.PREDICTIONS),
        (PRIOR, releases.PRIOR),
        (EVALUATION / releases.REPORT, releases.REPORT),
    ):
        try:
            shutil.copyfile(source, kept / name)
        except FileNotFoundError:
            faults.append(GateError(f"{source}: no such file; run `dvc repro evaluate` first"))
        except OSError as error:
            (kept / name).unlink(missing_ok=True)
            faults.append(GateError(f"{source}: cannot be copied ({error.strerror})"))
    return faults[0] if faults else None
