"""Answers as a person or a program reads them: tables and JSON."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from serving.client import Prediction, Status
from serving.promotion import VersionState


def as_mapping(image: Path, answer: Prediction, top: int | None) -> dict[str, object]:
    """One image's answer as JSON takes it: its best `top` classes, all that came when None."""
    best = zip(answer.classes, answer.indexes, answer.probabilities, strict=True)
    rows = [{"class": name, "index": index, "probability": p} for name, index, p in best]
    return {"image": str(image), "version": answer.version, "predictions": rows[:top]}


def prediction_table(
    images: Sequence[Path], answers: Sequence[Prediction], top: int | None, prior: str | None
) -> Table:
    """A table of every image's best `top` classes with their probabilities."""
    versions = ", ".join(str(version) for version in sorted({answer.version for answer in answers}))
    table = Table(title=f"prior {prior or 'as the server defaults to'}, version {versions}")
    table.add_column("image", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("probability", justify="right")
    for image, answer in zip(images, answers, strict=True):
        for rank, (name, p) in enumerate(zip(answer.classes[:top], answer.probabilities[:top], strict=True)):
            table.add_row("" if rank else escape(str(image)), escape(name), f"{p:.4f}")
        table.add_section()
    return table


def status_table(found: Status) -> Table:
    """A table of the models, their versions and whether they answer."""
    table = Table(title=f"{found.server} {found.server_version} at {found.url}")
    table.add_column("model")
    table.add_column("versions")
    table.add_column("state")
    for model in found.models:
        state = "not loaded" if not model.versions else "answers" if found.answers else "does not answer"
        table.add_row(model.name, ", ".join(map(str, model.versions)), state)
    return table


def versions_table(found: Sequence[VersionState], repository: str) -> Table:
    """A table of a repository's releases: state, age, and the test accuracy that their manifests report."""
    table = Table(title=f"releases in {repository}")
    for heading in ("version", "state", "published", "balanced accuracy", "few", "code"):
        table.add_column(heading)
    for state in reversed(found):
        manifest = state.release.manifest
        scores = manifest.metrics.get("balanced")
        scores = scores if isinstance(scores, dict) else {}
        shown = [f"{scores[name]:.3f}" if isinstance(scores.get(name), float) else "" for name in ("all", "few")]
        published = time.strftime("%Y-%m-%d %H:%M", time.localtime(state.published))
        table.add_row(str(state.version), state.state, published, *shown, escape(manifest.code_revision[:12]))
    return table
