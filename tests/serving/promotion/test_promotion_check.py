"""`tailor promote` of a release that is worse than the champion or not comparable with it."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import write_export

from serving.commands import main
from serving.promotion.check import FIGURES
from serving.repository.manifest import MANIFEST_NAME
from serving.repository.release import list_versions
from serving.repository.writer import publish, write_repository
from serving.shared.names import CLASSIFIER


class Terminal(io.StringIO):
    """Standard input that reports a terminal."""

    def isatty(self) -> bool:
        """Return True."""
        return True


def export(folder: Path, version: int, accuracy: float | None, **others: float) -> Path:
    """Write an export with test accuracies for the balanced prior: all `accuracy` except `others`; or none."""
    write_export(folder, version)
    path = folder / MANIFEST_NAME
    figures = {} if accuracy is None else {"balanced": dict.fromkeys(FIGURES, accuracy) | others}
    path.write_text(json.dumps({**json.loads(path.read_text()), "metrics": figures}))
    return folder


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose champion has a test accuracy of 50 %; standard input is not a terminal."""
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    return write_repository(export(tmp_path / "first", 1, 0.5), tmp_path / "releases")


def promote(root: Path, release: Any, *options: str) -> int:
    """Run the command without a server; return its exit status."""
    return main(["promote", str(release), "--repository", str(root), "--no-rehearsal", *options])


def champion(root: Path) -> int:
    """Return the champion's version."""
    return next(found.version for found in list_versions(root) if found.state == "champion")


@pytest.mark.parametrize(
    ("accuracy", "doubt"),
    [
        (0.458, "its test accuracy of all classes is 45.8%, below the champion's 50.0%"),
        (None, "it cannot be compared with the champion, as a manifest has no test accuracy"),
    ],
)
def test_a_worse_or_incomparable_release_needs_force_without_a_terminal(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], accuracy: float | None, doubt: str
) -> None:
    worse = export(tmp_path / "second", 2, accuracy)
    assert promote(root, worse) == 1
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] == f"tailor: {worse} is not promoted: {doubt}; give --force to promote it"
    assert printed.out == "" and champion(root) == 1 and len(list_versions(root)) == 1
    assert promote(root, worse, "--force", "--json") == 0
    assert json.loads(capsys.readouterr().out)["version"] == 2 and champion(root) == 2


def test_a_better_release_is_promoted_at_once_and_shown_beside_the_champion(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert promote(root, export(tmp_path / "second", 2, 0.55)) == 0
    (row,) = [line.split() for line in capsys.readouterr().err.splitlines() if line.startswith(("all", " all"))]
    assert row == ["all", "classes", "50.0%", "55.0%", "+5.0", "points"] and champion(root) == 2


def test_a_release_that_is_better_on_average_and_worse_for_few_shot_classes_needs_force(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert promote(root, export(tmp_path / "second", 2, 0.6, few=0.4)) == 1
    assert "its test accuracy of few is 40.0%, below the champion's 50.0%" in capsys.readouterr().err
    # Classes with more test images have no larger weight.
    assert promote(root, export(tmp_path / "third", 3, 0.6, all=0.3)) == 0


@pytest.mark.parametrize(("answer", "status", "after"), [("y\n", 0, 2), ("n\n", 1, 1), ("\n", 1, 1)])
def test_on_a_terminal_a_worse_release_is_promoted_after_a_confirmation_alone(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, status: int, after: int
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    assert promote(root, export(tmp_path / "second", 2, 0.4)) == status
    assert champion(root) == after


def test_a_published_version_that_the_gate_refused_needs_force(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(export(tmp_path / "second", 2, 0.9), root)
    decision = {"promote": False, "reasons": ["few 0.9 → 0.1"]}
    (root / CLASSIFIER / "2" / "decision.json").write_text(json.dumps(decision))
    assert promote(root, 2) == 1
    printed = capsys.readouterr().err
    assert "the gate: refuse: few 0.9 → 0.1" in printed and "the gate refused it; give --force" in printed
    assert promote(root, 2, "--force") == 0 and champion(root) == 2


def test_a_published_version_that_the_gate_did_not_decide_on_needs_force(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(export(tmp_path / "second", 2, 0.9), root)
    decision = {"promote": False, "undecided": True, "reasons": ["few: 8 test images"]}
    (root / CLASSIFIER / "2" / "decision.json").write_text(json.dumps(decision))
    assert promote(root, 2) == 1
    printed = capsys.readouterr().err
    assert "the gate: not decided: few: 8 test images" in printed and "the gate did not decide on it; give" in printed


def test_promotion_of_the_champion_needs_no_confirmation(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert promote(root, 1) == 0
    assert capsys.readouterr().err == ""
