"""`tailor history`: the recorded history of every version of a repository."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
from conftest import write_export
from rich.console import Console

from serving.commands.versions import versions_table
from serving.promotion.history import history_table, read_history
from serving.promotion.promotion import promote, rollback
from serving.repository.manifest import ManifestError
from serving.repository.promotion_log import LOG_NAME, read_changes, record
from serving.repository.release import list_versions
from serving.repository.writer import write_repository
from serving.shared.errors import InputError
from serving.shared.names import CLASSIFIER
from tests.support.tailor_command import Tailor

DECISION = {"promote": True, "computed": True, "reasons": ["not worse than the champion"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository: version 1 written, version 2 promoted with its decision, version 3 promoted and rolled back."""
    tmp_path = tmp_path_factory.mktemp("made")
    write_export(tmp_path / "one", 1)
    root = write_repository(tmp_path / "one", tmp_path / "repository")
    for number in (2, 3):
        write_export(tmp_path / str(number), number)
        promote(root, tmp_path / str(number), servers=[], rehearsal=False)
    (root / CLASSIFIER / "2" / "decision.json").write_text(json.dumps(DECISION))
    (root / CLASSIFIER / "2" / "retrain.json").write_text(json.dumps({"because": "the schedule"}))
    rollback(root, servers=[], rehearsal=False)
    return root


@pytest.fixture
def repository(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "repository"))


def test_history_lists_every_version_with_its_state_and_promotions(repository: Path) -> None:
    found = read_history(repository)
    assert [(entry.state.version, entry.state.state) for entry in found.versions] == [
        (1, "kept"), (2, "champion"), (3, "kept"),
    ]  # fmt: skip
    one, two, three = found.versions
    assert (one.changes, one.promoted) == ((), None)
    assert [(change.action, change.previous) for change in two.changes] == [("promote", 1), ("rollback", 3)]
    assert [(change.action, change.previous) for change in three.changes] == [("promote", 2)]
    assert time.time() - 600 < three.promoted < two.promoted <= time.time()


def test_decision_and_story_are_read_where_a_retraining_left_them(repository: Path) -> None:
    one, two, _ = read_history(repository).versions
    assert (one.decision, one.story) == (None, None)
    assert (two.decision, two.story) == (DECISION, {"because": "the schedule"})


def test_the_table_is_newest_first_and_names_data_params_and_decision(repository: Path) -> None:
    console = Console(width=200, record=True)
    console.print(history_table(read_history(repository), wide=True))
    lines = console.export_text().splitlines()
    rows = [line for line in lines if "champion" in line or "kept" in line]
    assert [row.split()[1] for row in rows] == ["3", "2", "1"]
    assert "promote: not worse than the champion" in rows[1] and "00000000" in rows[1]
    assert "no server runs on it here" in lines[0]


def test_the_table_fits_120_columns_with_a_long_decision(repository: Path) -> None:
    path = repository / CLASSIFIER / "2" / "decision.json"
    path.write_text(json.dumps({**DECISION, "reasons": ["few 0.4125 → 0.4375 (+0.0250, interval -0.01 to +0.06)"] * 3}))
    console = Console(width=120, record=True)
    console.print(history_table(read_history(repository)))
    lines = console.export_text().splitlines()
    rows = [line for line in lines if "champion" in line or "kept" in line]
    assert len(rows) == 3 and all("…" not in line and len(line) <= 120 for line in lines)
    assert "data" not in " ".join(lines) and len(lines) <= 14  # the decision fits


def test_the_tables_show_balanced_accuracy_and_not_the_share_of_unequal_test_images(repository: Path) -> None:
    scored = {"balanced": {"all": 0.091, "balanced_accuracy": 0.3, "few": 0.5}}
    for path in repository.glob("*/2/manifest.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"metrics": scored}))
    for table in (history_table(read_history(repository)), versions_table(list_versions(repository), "repository")):
        console = Console(width=120, record=True)
        console.print(table)
        text = console.export_text()
        assert "balanced" in text and "0.300" in text and "0.500" in text and "0.091" not in text


def test_the_json_is_complete_and_has_times_in_utc(repository: Path) -> None:
    told = json.loads(json.dumps(read_history(repository).as_mapping(), allow_nan=False))
    assert [entry["version"] for entry in told["versions"]] == [3, 2, 1]
    two = told["versions"][1]
    assert two["data_sha256"] == two["params_sha256"] == "0" * 64
    assert [change["action"] for change in two["promoted"]] == ["promote", "rollback"]
    assert two["promoted"][0]["at"].endswith("Z") and two["decision"] == DECISION
    assert (told["servers"], two["training_images"]) == ([], sum(two_counts(repository)))


def two_counts(repository: Path) -> list[int]:
    return json.loads((repository / CLASSIFIER / "2" / "manifest.json").read_text())["counts"]


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_damaged_decision_is_named(repository: Path, content: str) -> None:
    path = repository / CLASSIFIER / "2" / "decision.json"
    path.write_text(content)
    with pytest.raises(ManifestError, match=str(path)):
        read_history(repository)


def test_a_line_that_a_killed_process_left_half_written_costs_no_other(tmp_path: Path) -> None:
    record(tmp_path, "promote", 2, 1)
    with (tmp_path / LOG_NAME).open("a") as stream:
        stream.write('{"at": 1.0, "act')
    record(tmp_path, "promote", 3, 2)
    assert [change.version for change in read_changes(tmp_path)] == [2, 3]


def test_a_promotion_that_cannot_be_logged_is_reported_and_still_succeeds(tmp_path: Path, capsys) -> None:
    (tmp_path / LOG_NAME).mkdir()
    record(tmp_path, "promote", 2, 1)
    assert f"{tmp_path / LOG_NAME}: Is a directory" in capsys.readouterr().err
    assert read_changes(tmp_path) == []


def test_a_refused_promotion_leaves_no_line(repository: Path) -> None:
    before = read_changes(repository)
    with pytest.raises(InputError):
        promote(repository, 1, servers=[], rehearsal=False)
    assert read_changes(repository) == before


@pytest.mark.slow
def test_the_command_prints_it(tailor: Tailor, repository: Path) -> None:
    done = tailor("history", "--repository", repository, "--json")
    assert done.returncode == 0, done.stderr
    assert [entry["state"] for entry in json.loads(done.stdout)["versions"]] == ["kept", "champion", "kept"]
    missing = tailor("history", "--repository", "nowhere")
    assert (missing.returncode, missing.stdout) == (1, "") and missing.stderr.count("\n") == 1
