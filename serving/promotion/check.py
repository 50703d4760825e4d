"""Compare a release with the champion before a manual promotion: test accuracies and the gate's decision."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from serving.promotion.history import DECISION_NAME, decision_text, read_optional_json
from serving.repository.manifest import read_manifest
from serving.repository.release import published_versions, read_champion, read_release
from serving.shared.names import image_model
from serving.shared.terminal import cell

# Keys of a manifest's test accuracies for the balanced prior (means over classes) → their names in the table.
FIGURES = {"balanced_accuracy": "all classes", "many": "many", "medium": "medium", "few": "few"}
Figures = dict[str, tuple[float | None, float | None]]
DECIDING = ("balanced_accuracy", "few")  # a lower value of one of these needs a confirmation


@dataclass(frozen=True)
class PromotionCheck:
    """A comparison of a release with the champion.

    figures: key of FIGURES → (value of the champion, value of the release), None if a manifest has no value. decision:
    of the gate, one line; empty if there was none. confirmation_reason: why the promotion needs a confirmation, else None.
    measure: name of the figures.
    """

    champion: int
    release: str
    figures: Figures
    decision: str
    confirmation_reason: str | None
    measure: str = "test accuracy"


def check_promotion(repository: Path, release: Path | int) -> PromotionCheck | None:
    """Compare a release with the champion of a repository; None if it is the champion, older, or not published.

    release: an export folder or a version. Raises RepositoryError or ManifestError naming a damaged file.
    """
    champion = read_champion(repository)
    decision = None
    if isinstance(release, int):
        if release <= champion.version or release not in published_versions(repository):
            return None  # the promotion rejects it, or has nothing to do
        manifest = read_release(repository, release, hashes=False).manifest
        decision = read_optional_json(repository / image_model(repository) / str(release) / DECISION_NAME)
    else:
        manifest = read_manifest(release)
    if manifest.files == champion.manifest.files:
        return None
    figures = {name: (champion.manifest.balanced_metric(name), manifest.balanced_metric(name)) for name in FIGURES}
    name = f"version {release}" if isinstance(release, int) else str(release)
    measure = "mIoU on test images" if manifest.segmentation else "test accuracy"
    reason = _reason_to_confirm(figures, decision, measure)
    return PromotionCheck(champion.version, name, figures, decision_text(decision), reason, measure)


def _reason_to_confirm(figures: Figures, decision: dict[str, Any] | None, measure: str) -> str | None:
    if decision is not None and decision.get("promote") is not True:
        return "the gate did not decide on it" if decision.get("undecided") is True else "the gate refused it"
    if None in figures["balanced_accuracy"]:
        return f"it cannot be compared with the champion, as a manifest has no {measure}"
    for name in DECIDING:
        before, after = figures[name]
        if before is not None and after is not None and after < before:
            return f"its {measure} of {FIGURES[name]} is {after:.1%}, below the champion's {before:.1%}"
    return None


def promotion_table(check: PromotionCheck) -> Table:
    """A table of the comparison: a row for each class group, columns champion, release and difference."""
    table = Table(title=cell(f"{check.release} beside the champion"), title_justify="left", box=None)
    table.add_column(f"{check.measure}, balanced prior")
    for name in (f"champion {check.champion}", "release", "difference"):
        table.add_column(cell(name), justify="right")
    for name, (before, after) in check.figures.items():
        shown = ["unknown" if value is None else f"{value:.1%}" for value in (before, after)]
        points = "" if before is None or after is None else f"{100 * (after - before):+.1f} points"
        table.add_row(FIGURES[name], *shown, points)
    return table
