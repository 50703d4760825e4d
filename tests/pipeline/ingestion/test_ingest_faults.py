"""Ingest killed at any point, or on a full disk: a round is complete or absent, and the next run finishes it."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from pipeline.ingestion.ingest import ingest
from pipeline.shared.errors import StageError
from tests.support.dropping import drop_images, files, project, shards
from tests.support.making import table, write


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.fault_case("disk-full-during-ingest")
def test_a_full_disk_while_the_round_is_written_changes_nothing(tmp_path, monkeypatch):
    params = project(tmp_path, min_good_share=0.0)
    drop_images("cat", range(2))
    write(Path("data/drop/cat/bad.png"), b"no image")

    def disk_full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = files("data/drop")
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", disk_full)
        patch.setattr(shutil, "copyfile", disk_full)
        with pytest.raises(OSError, match="No space left"):
            ingest(params)
    assert files("data/drop") == before and not files("data/ingested") and not files("data/quarantine")
    assert ingest(params).added == 2


# A process killed by SIGKILL at its n-th change of the disk, for every n until it finishes.
@pytest.mark.parametrize("plan", ['{"drop', '{"written": {"shard": null}}', '{"shard": null, "report": {}}'])
def test_a_damaged_plan_or_that_of_an_older_version_is_refused_with_the_remedy(tmp_path, plan):
    params = project(tmp_path)
    write(Path("data/.ingest/round/plan.json"), plan.encode())
    with pytest.raises(StageError, match=r"plan\.json: damaged \(.*\); remove data/\.ingest/round and run again"):
        ingest(params)


CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "shutil.rmtree"}


def is_killed_at(change: int, params) -> bool:
    """Run ingest in a child process that is killed at the given disk change; return whether it was killed."""
    child = os.fork()
    if child == 0:
        remaining = [change]

        def count(event: str, arguments: tuple) -> None:
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if event in CHANGES or writes:
                remaining[0] -= 1
                if remaining[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            ingest(params)
        except BaseException:
            os._exit(3)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def write_drop() -> None:
    drop_images("cat", range(3))
    images = drop_images("photos", range(10, 13))
    paths = [str(path.relative_to("data/drop")) for path in images]
    table(Path("data/drop/labels.csv"), {"path": paths, "label": ["dog", "eel", "gnu"]})
    write(Path("data/drop/dog/bad.png"), b"no image")
    write(Path("data/drop/.complete"), b"")


def outcome() -> tuple:
    """Return the state that must be the same, independent of when a run was killed."""
    waiting = [path for path in files("data/drop") if "/.taken/" not in path]
    quarantined = [data for path, data in files("data/quarantine").items() if path.endswith(".png")]
    return shards(), sorted(quarantined), waiting, sorted(path.name for path in Path("data/.ingest").iterdir())


@pytest.mark.slow
@pytest.mark.fault_case("killed-during-ingest")
def test_the_run_after_a_kill_at_any_disk_change_completes_the_round(tmp_path):
    root = tmp_path / "made"
    root.mkdir()
    params = project(root, min_good_share=0.0, require_marker=True)
    changes, killed, expected = 0, True, None
    while killed:
        shutil.copytree(root / "data/split", tmp_path / str(changes) / "data/split")
        os.chdir(tmp_path / str(changes))
        write_drop()
        held = files("data/split")
        killed = is_killed_at(changes, params)
        for shard in Path("data/ingested").glob("*.parquet"):
            assert hashlib.sha256(shard.read_bytes()).hexdigest() == shard.stem
        # The next run has nothing to report only if the killed one had finished its changes.
        in_place = bool(files("data/ingested")) and not Path("data/.ingest/round/plan.json").exists()
        if killed:
            again = ingest(params)
            expect = (0, 0) if in_place else (5, 2)
            assert (again.added, again.quarantined) == expect and again.refused is None, f"killed at change {changes}"
        assert files("data/split") == held
        expected = expected or outcome()
        assert outcome() == expected, f"killed at change {changes}"
        changes += 1
    assert changes > 20
    assert [row["label"] for row in expected[0]] == ["cat"] * 3 + ["dog", "eel"]
    assert len(expected[1]) == 2 and expected[2] == []
