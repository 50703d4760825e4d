"""Records of retraining runs: JSON files for the next run and `tailor doctor`, and the evidence for `tailor history`.

artifacts/retrain/running.json      the current run
artifacts/retrain/last.json         the last finished run: time, reason, outcome
artifacts/retrain/decided.json      the last release with a decision, so that no later run decides on it again
artifacts/retrain/<identity>/       the evidence of a decision, which is also copied into the version's folder
"""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pipeline.params import GateParams
from pipeline.shared.artifacts import sha256_of_json, write_json

FOLDER = Path("artifacts/retrain")
KEEP = 20  # number of evidence folders

Ending = Literal["promoted", "refused", "undecided", "unchanged", "failed", "skipped", "busy"]


@dataclass(frozen=True)
class Outcome:
    """Outcome of a run: one word, one sentence, the version that is served and the folder of evidence, if any."""

    ending: Ending
    message: str
    version: int | None = None
    evidence: str | None = None


@dataclass(frozen=True)
class RunRecord:
    """Record of one run. begun, ended: UTC in ISO format; ended is None while it runs. process: process id."""

    begun: str
    ended: str | None
    because: str
    process: int
    outcome: Outcome | None


@dataclass(frozen=True)
class DecisionRecord:
    """Decision on a release: its identity, the champion it was compared with, the hash of the gate's params."""

    release: str
    champion: int | None
    gate_sha256: str
    ending: Ending
    version: int | None

    def already_decided(self, release: str, champion: int | None, gate: GateParams) -> bool:
        """Whether this record already decides the release, so that no new decision is made.

        A promoted release is never re-promoted automatically, because an operator may have rolled it back. A refused
        release is decided again if the champion or the gate's params have changed.
        """
        if self.release != release:
            return False
        return self.ending == "promoted" or (self.champion == champion and self.gate_sha256 == gate_sha256(gate))


def gate_sha256(gate: GateParams) -> str:
    """sha256 of the gate's params."""
    return sha256_of_json(gate.model_dump(mode="json"))


def now() -> datetime:
    """Current UTC time without microseconds (wall clock), for display and to order runs."""
    return datetime.now(UTC).replace(microsecond=0)


def write_run(run: RunRecord, folder: Path = FOLDER) -> None:
    """Write the record of a run: `running.json` while it runs, then `last.json`."""
    write_json(folder / ("last.json" if run.ended else "running.json"), asdict(run))
    if run.ended:
        (folder / "running.json").unlink(missing_ok=True)


def read_run(name: str, folder: Path = FOLDER) -> RunRecord | None:
    """Read the run record `last` or `running`; None if the file does not exist, is damaged or cannot be read."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        content = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        outcome = content.pop("outcome")
        return RunRecord(**content, outcome=outcome and Outcome(**outcome))
    return None


def missed_run(scheduled: datetime, folder: Path = FOLDER) -> RunRecord | None:
    """The last finished run, if it began after `scheduled` and thus replaces the run missed at that time; else None.

    A start time in the future means that the clock was set back; such a run does not count.
    """
    last = read_run("last", folder)
    if last is None or last.outcome is None or last.outcome.ending in ("failed", "skipped", "busy"):
        return None
    return last if scheduled < datetime.fromisoformat(last.begun) <= now() else None


def write_decision(decided: DecisionRecord, folder: Path = FOLDER) -> None:
    """Write the decision on a release to decided.json."""
    write_json(folder / "decided.json", asdict(decided))


def read_decision(folder: Path = FOLDER) -> DecisionRecord | None:
    """Read the last decision on a release; None if the file does not exist, is damaged or cannot be read."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return DecisionRecord(**json.loads((folder / "decided.json").read_text(encoding="utf-8")))
    return None


def prune(current: Path, keep: int = KEEP) -> None:
    """Delete the oldest evidence folders beside `current`, so that `keep` remain.

    The evidence of published versions is also in their folders. Age is the modification time, which is wrong after the
    clock was set back; `current` is never deleted.
    """
    others = [path for path in current.parent.iterdir() if path.is_dir() and path.name != current.name]
    for path in sorted(others, key=lambda path: path.stat().st_mtime)[: max(0, len(others) + 1 - keep)]:
        shutil.rmtree(path)
