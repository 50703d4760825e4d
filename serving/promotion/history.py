"""Version history of a repository: data, params and code of each version, its metrics, decision and promotions."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from serving.repository.manifest import Manifest, ManifestError
from serving.repository.promotion_log import Change, read_changes
from serving.repository.release import VersionState, list_versions
from serving.server.running import find_running
from serving.shared.names import image_model
from serving.shared.terminal import cell

# Files in a classifier's version folder that a retraining wrote: the gate's decision, and the reason for the run.
DECISION_NAME, STORY_NAME = "decision.json", "retrain.json"


@dataclass(frozen=True)
class VersionHistory:
    """One version with its history.

    decision: content of decision.json; story: content of retrain.json; None if the version has no such file. changes:
    each time that it became the champion, oldest first; empty if its repository was written with it.
    """

    state: VersionState
    decision: dict[str, Any] | None
    story: dict[str, Any] | None
    changes: tuple[Change, ...]

    @property
    def promoted(self) -> float | None:
        """Time of its last promotion to champion, in seconds since the epoch; None if not recorded."""
        return self.changes[-1].at if self.changes else None

    def as_mapping(self) -> dict[str, Any]:
        """As a mapping for JSON; times in UTC."""
        manifest = self.state.release.manifest
        return {
            "version": self.state.version,
            "state": self.state.state,
            "published": utc(self.state.published),
            "promoted": [{"at": utc(change.at), "action": change.action} for change in self.changes],
            "data_sha256": manifest.data_sha256,
            "params_sha256": manifest.params_sha256,
            "code_revision": manifest.code_revision,
            "code_sha256": manifest.code_sha256,
            "training_images": sum(manifest.counts),
            "metrics": manifest.metrics,
            "decision": self.decision,
            "story": self.story,
        }


@dataclass(frozen=True)
class RepositoryHistory:
    """The versions of a repository, oldest first, and the gRPC addresses of this user's servers that run on it."""

    repository: Path
    versions: list[VersionHistory]
    servers: tuple[str, ...]

    def as_mapping(self) -> dict[str, Any]:
        """As a mapping for JSON, the newest version first."""
        return {
            "repository": str(self.repository),
            "servers": list(self.servers),
            "versions": [version.as_mapping() for version in reversed(self.versions)],
        }


def read_history(repository: Path) -> RepositoryHistory:
    """Read the history of all versions of a repository. Raises RepositoryError or ManifestError naming the file."""
    changes = read_changes(repository)
    versions = []
    for state in list_versions(repository):
        folder = repository / image_model(repository) / str(state.version)
        decision, story = read_optional_json(folder / DECISION_NAME), read_optional_json(folder / STORY_NAME)
        own_changes = tuple(change for change in changes if change.version == state.version)
        versions.append(VersionHistory(state, decision, story, own_changes))
    return RepositoryHistory(repository, versions, tuple(server.grpc_url for server in find_running(repository)))


def history_table(history: RepositoryHistory, wide: bool = False) -> Table:
    """A table with a row for each version, the newest first.

    wide: add the hashes of data, params and code, which need more than 120 columns.
    """
    by = f", served at {', '.join(history.servers)}" if history.servers else ", no server runs on it here"
    table = Table(title=cell(f"{history.repository}{by}"))
    hashes = ("data", "params", "code") if wide else ()
    for heading in ("version", "state", "promoted", "images", *hashes, "balanced", "few"):
        table.add_column(heading, no_wrap=True)
    table.add_column("decision")
    for version in reversed(history.versions):
        manifest = version.state.release.manifest
        when = version.promoted
        table.add_row(
            str(version.state.version),
            version.state.state,
            time.strftime("%Y-%m-%d %H:%M", time.localtime(when)) if when else "",
            f"{sum(manifest.counts):,}",
            *((manifest.data_sha256[:8], manifest.params_sha256[:8], cell(manifest.code_revision[:8])) if wide else ()),
            *scores(manifest),
            cell(decision_text(version.decision)),
        )
    return table


def scores(manifest: Manifest) -> list[str]:
    """Mean test accuracy over all classes and over few-shot classes for the balanced prior; '' if not recorded."""
    figures = [manifest.balanced_metric(name) for name in ("balanced_accuracy", "few")]
    return ["" if figure is None else f"{figure:.3f}" for figure in figures]


def decision_text(decision: dict[str, Any] | None) -> str:
    """The gate's decision and its reasons as one line; empty if there was none."""
    if decision is None:
        return ""
    reasons = decision.get("reasons")
    why = "; ".join(map(str, reasons)) if isinstance(reasons, list) else ""
    verdict = "promote" if decision.get("promote") is True else "refuse"
    return f"{'not decided' if decision.get('undecided') is True else verdict}: {why}"


def utc(seconds: float) -> str:
    """A time in seconds since the epoch as UTC in ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def read_optional_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object from a file; None if the file does not exist. Raises ManifestError naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path}: not readable: {error}; restore or remove it") from None
    if not isinstance(content, dict):
        raise ManifestError(f"{path}: holds {type(content).__name__}; expected an object")
    return content
