"""Answers as a person or a program reads them: tables and JSON."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from models.prior import shot_group
from serving.answers import Prediction, Status
from serving.drift import Drift
from serving.errors import ServingError
from serving.manifest import Manifest
from serving.promotion import VersionState
from serving.release_history import scores
from serving.terminal import cell, csv_cell

CSV_COLUMNS = ("image", "version", "rank", "class", "index", "probability", "error")


def as_mapping(image: Path, answer: Prediction | ServingError, top: int | None) -> dict[str, object]:
    """One image's answer as JSON takes it: its best `top` classes, all that came when None; or its error."""
    if isinstance(answer, ServingError):
        return {"image": str(image), "error": str(answer)}
    rows = [{"class": name, "index": index, "probability": p} for name, index, p in _best(answer, top)]
    return {"image": str(image), "version": answer.version, "predictions": rows}


def as_rows(image: Path, answer: Prediction | ServingError, top: int | None) -> list[list[object]]:
    """One image's answer as rows of CSV_COLUMNS, best class first; or one row with its error."""
    if isinstance(answer, ServingError):
        return [[csv_cell(image), "", "", "", "", "", csv_cell(answer)]]
    best = enumerate(_best(answer, top), start=1)
    return [[csv_cell(image), answer.version, rank, csv_cell(name), index, p, ""] for rank, (name, index, p) in best]


def prediction_table(
    pairs: Sequence[tuple[Path, Prediction | ServingError]], top: int | None, prior: str | None
) -> Table:
    """A table of every image's best `top` classes with their probabilities."""
    found = {answer.version for _, answer in pairs if isinstance(answer, Prediction)}
    versions = ", ".join(str(version) for version in sorted(found)) or "none"
    table = Table(title=f"prior {cell(prior or 'as the server defaults to')}, version {versions}")
    table.add_column("image", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("probability", justify="right")
    for image, answer in pairs:
        if isinstance(answer, ServingError):
            table.add_row(cell(str(image)), "not classified", "")
        else:
            for rank, (name, _, p) in enumerate(_best(answer, top)):
                table.add_row("" if rank else cell(str(image)), cell(name), f"{p:.4f}")
        table.add_section()
    return table


def status_table(found: Status) -> Table:
    """A table of the models, their versions and whether they answer."""
    table = Table(title=cell(f"{found.server} {found.server_version} at {found.url}"))
    table.add_column("model")
    table.add_column("versions")
    table.add_column("state")
    for model in found.models:
        state = "not loaded" if not model.versions else "answers" if found.answers else "does not answer"
        table.add_row(cell(model.name), ", ".join(map(str, model.versions)), state)
    return table


def versions_table(found: Sequence[VersionState], repository: str) -> Table:
    """A table of a repository's releases: state, age, and the test accuracy that their manifests report."""
    table = Table(title=cell(f"releases in {repository}"))
    for heading in ("version", "state", "published", "balanced accuracy", "few", "code"):
        table.add_column(heading)
    for state in reversed(found):
        manifest = state.release.manifest
        shown = scores(manifest.metrics, ("balanced_accuracy", "few"))
        published = time.strftime("%Y-%m-%d %H:%M", time.localtime(state.published))
        table.add_row(str(state.version), state.state, published, *shown, cell(manifest.code_revision[:12]))
    return table


def drift_table(found: Drift, manifest: Manifest, top: int, title: str) -> Table:
    """A table of the live class prior: the groups, then the `top` most shifted classes."""
    table = Table(title=f"class prior of {cell(title)}")
    table.add_column("classes", overflow="fold")
    for name in ("training", "live", f"{found.confidence:.0%} interval", "times"):
        table.add_column(name, justify="right")

    def add(name: str, training: float, live: float, low: float, high: float) -> None:
        times = f"{live / training:.2f}" if training > 1e-6 else ""
        table.add_row(cell(name), f"{training:.3f}", f"{live:.3f}", f"{low:.3f} to {high:.3f}", times)

    groups = [shot_group(count) for count in manifest.counts]
    for group, share in found.groups.items():
        members = [p for p, of in zip(found.training, groups, strict=True) if of == group]
        add(f"{group} ({len(members)})", sum(members), share.value, share.low, share.high)
    table.add_section()
    for c in found.most_shifted(top):
        add(manifest.classes[c], found.training[c], found.prior[c], found.low[c], found.high[c])
    return table


def load_table(found: Mapping[str, Any], url: str) -> Table:
    """A table of a load test: a row for each kind of request, by the version that answered, and one for all."""
    table = Table(title=f"load on {cell(url)}: {'held' if found['passed'] else 'failed'}")
    table.add_column("requests")
    for name in ("number", "failed", "per second", "p50 ms", "p99 ms"):
        table.add_column(name, justify="right")
    for kind in [*found["kinds"], found["total"]]:
        if kind is found["total"]:
            table.add_section()
        counts = (f"{kind['requests']}", f"{kind['failures']}", f"{kind['rps']:.1f}")
        table.add_row(cell(kind["name"]), *counts, f"{kind['p50_ms']:.0f}", f"{kind['p99_ms']:.0f}")
    return table


def overhead_line(overhead: Mapping[str, float] | None, users: int) -> str:
    """What the load generator itself cost, against a bare client loop."""
    if overhead is None:
        return "overhead of Locust: not measured"
    return (
        f"overhead of Locust: {overhead['locust_rps']:.0f} requests/s at {overhead['locust_ms']:.2f} ms of processor "
        f"each; a bare client {overhead['bare_rps']:.0f} at {overhead['bare_ms']:.2f} "
        f"(closed, {users} users, one process each): {overhead['locust_rps'] / max(overhead['bare_rps'], 1e-9):.2f} of it"
    )


def _best(answer: Prediction, top: int | None) -> list[tuple[str, int, float]]:
    return list(zip(answer.classes, answer.indexes, answer.probabilities, strict=True))[:top]
