"""What runs leave for the next run, for `tailor history` and for whoever asks why: a few small JSON files.

artifacts/retrain/last.json         the last run: when, why, how it ended
artifacts/retrain/decided.json      the last release that was decided on, so that nobody decides on it twice
artifacts/retrain/<identity>/       the evidence of a decision, which goes into the version's folder too
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
KEPT = 20  # folders of evidence

Ending = Literal["promoted", "refused", "undecided", "unchanged", "failed", "skipped", "busy"]


@dataclass(frozen=True)
class Outcome:
    """How a run ended, in one word and in one sentence; the version that answers and the folder of evidence, if any."""

    ending: Ending
    message: str
    version: int | None = None
    evidence: str | None = None


@dataclass(frozen=True)
class Run:
    """One run: begun and ended are UTC in ISO form, ended is None while it runs."""

    begun: str
    ended: str | None
    because: str
    process: int
    outcome: Outcome | None


@dataclass(frozen=True)
class Decided:
    """What became of a release: by its identity, against which champion, under which gate."""

    release: str
    champion: int | None
    gate_sha256: str
    ending: Ending
    version: int | None

    def settles(self, release: str, champion: int | None, gate: GateParams) -> bool:
        """Whether a release need not be decided on again. What was promoted once is never promoted anew by itself:
        somebody may have rolled it back. What was refused may do better against another champion or under another gate.
        """
        if self.release != release:
            return False
        return self.ending == "promoted" or (self.champion == champion and self.gate_sha256 == gate_sha256(gate))


def gate_sha256(gate: GateParams) -> str:
    """sha256 of the gate's params."""
    return sha256_of_json(gate.model_dump(mode="json"))


def now() -> datetime:
    """The time in UTC, by the wall clock: only for people, and to tell which of two runs came first."""
    return datetime.now(UTC).replace(microsecond=0)


def write_run(run: Run, folder: Path = FOLDER) -> None:
    """Keep the run as the last one: `running.json` while it runs, then `last.json`."""
    write_json(folder / ("last.json" if run.ended else "running.json"), asdict(run))
    if run.ended:
        (folder / "running.json").unlink(missing_ok=True)


def read_run(name: str, folder: Path = FOLDER) -> Run | None:
    """The run in `last` or `running`; None where there is none, or its file is not ours to read."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        content = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        outcome = content.pop("outcome")
        return Run(**content, outcome=outcome and Outcome(**outcome))
    return None


def missed(scheduled: datetime, folder: Path = FOLDER) -> Run | None:
    """The finished run that began after `scheduled` and so did what that run was to do; None where there is none.

    A run that seems to have begun in the future tells of a clock that was set back, and proves nothing.
    """
    last = read_run("last", folder)
    if last is None or last.outcome is None or last.outcome.ending in ("failed", "skipped", "busy"):
        return None
    begun = datetime.fromisoformat(last.begun)
    return last if scheduled < begun <= now() else None


def write_decided(decided: Decided, folder: Path = FOLDER) -> None:
    """Keep what became of a release."""
    write_json(folder / "decided.json", asdict(decided))


def read_decided(folder: Path = FOLDER) -> Decided | None:
    """The last release that was decided on; None where there is none, or its file is not ours to read."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Decided(**json.loads((folder / "decided.json").read_text(encoding="utf-8")))
    return None


def prune(current: Path, keep: int = KEPT) -> None:
    """Delete the oldest folders of evidence beside `current`; those of versions that are kept lie in the versions' folders.

    The times are the files' own, which a clock that was set back mixes up; `current` stays whatever they say.
    """
    others = [path for path in current.parent.iterdir() if path.is_dir() and path.name != current.name]
    for path in sorted(others, key=lambda path: path.stat().st_mtime)[: max(0, len(others) + 1 - keep)]:
        shutil.rmtree(path)
