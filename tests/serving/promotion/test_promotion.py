"""Promotion and rollback: on disk, and in a real server under continuous requests."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Release, picture

from serving.client.sync_client import Client
from serving.promotion.promotion import PromotionError, promote, rollback
from serving.repository.lock import RepositoryBusy, locked
from serving.repository.manifest import MANIFEST_NAME, STUDENT_NAME, sha256_of
from serving.repository.promotion_log import LOG_NAME
from serving.repository.release import list_versions, read_champion
from serving.repository.version_policy import serve_versions, served_versions
from serving.repository.writer import RUNTIME_FILES, publish
from serving.server.triton_server import TritonServer
from serving.shared.errors import InputError
from serving.shared.names import CLASSIFIER
from tests.support.steady_load import Load, assert_each_answer_is_its_versions

pytestmark = pytest.mark.slow

MODELS = ("student", "classifier")


def test_promotion_without_a_server_takes_effect_at_the_next_start(root: Path, exports: dict[int, Release]) -> None:
    done = promote(root, exports[2].export_dir, rehearsal=False)
    assert (done.version, done.previous, done.servers, done.rehearsed) == (2, 1, (), False)
    assert served_versions(root, "classifier") == served_versions(root, "student") == (1, 2)
    assert promote(root, exports[2].export_dir).previous == 2  # already the champion
    done = rollback(root)
    assert (done.version, done.previous) == (1, 2)
    assert served_versions(root, "classifier") == served_versions(root, "student") == (1,)
    assert promote(root, 2, rehearsal=False).version == 2


def test_old_versions_go_but_never_one_that_is_served(root: Path, exports: dict[int, Release]) -> None:
    for number in range(2, 6):
        done = promote(root, exports[number].export_dir, rehearsal=False, keep=3)
    assert done.removed == (2,)
    assert [(state.version, state.state) for state in list_versions(root)] == [
        (3, "kept"),
        (4, "served"),
        (5, "champion"),
    ]
    for model in ("student", "classifier"):
        assert sorted(path.name for path in (root / model).iterdir() if path.is_dir() and path.name != "configs") == [
            "3",
            "4",
            "5",
        ]
    assert rollback(root, 3, rehearsal=False).previous == 5
    assert promote(root, exports[6].export_dir, rehearsal=False, keep=2).removed == (4, 5)
    assert [(state.version, state.state) for state in list_versions(root)] == [(3, "served"), (6, "champion")]


def test_rollback_passes_over_a_version_that_was_only_published(root: Path, exports: dict[int, Release]) -> None:
    for number in (2, 3):
        promote(root, exports[number].export_dir, rehearsal=False)
    assert publish(exports[4].export_dir, root) == 4
    assert promote(root, exports[5].export_dir, rehearsal=False).version == 5
    assert rollback(root).version == 3


def test_rollback_passes_over_versions_that_were_rolled_back_from(root: Path, exports: dict[int, Release]) -> None:
    for number in (2, 3, 4):
        promote(root, exports[number].export_dir, rehearsal=False)
    assert rollback(root).version == 3
    promote(root, exports[5].export_dir, rehearsal=False)
    assert rollback(root).version == 3
    for number in (6, 7):
        promote(root, exports[number].export_dir, rehearsal=False, keep=9)
    assert [rollback(root, rehearsal=False).version for _ in range(3)] == [6, 3, 2]


def test_rollback_selects_the_newest_version_if_no_promotion_was_recorded(
    root: Path, exports: dict[int, Release]
) -> None:
    for number in (2, 3):
        promote(root, exports[number].export_dir, rehearsal=False)
    rollback(root)
    (root / LOG_NAME).unlink()
    assert rollback(root, rehearsal=False).version == 1


def cut_short(export: Path, copy: Path) -> Path:
    """Copy an export with a truncated graph that does not load; its manifest has the matching hash."""
    shutil.copytree(export, copy)
    graph = copy / STUDENT_NAME
    graph.write_bytes(graph.read_bytes()[:-40])
    manifest = json.loads((copy / MANIFEST_NAME).read_text())
    manifest["files"][STUDENT_NAME] = sha256_of(graph)
    (copy / MANIFEST_NAME).write_text(json.dumps(manifest))
    return copy


@pytest.mark.parametrize("rehearsal", [True, False])
def test_export_that_fails_its_verification_is_withdrawn_unless_it_existed_before(
    root: Path, exports: dict[int, Release], tmp_path: Path, rehearsal: bool
) -> None:
    unfit = cut_short(exports[2].export_dir, tmp_path / "unfit")
    with pytest.raises(PromotionError, match="version 2 failed its verification, version 1 stays"):
        promote(root, unfit, rehearsal=rehearsal)
    for model in MODELS:
        assert sorted(path.name for path in (root / model).iterdir() if path.name.strip(".")[0].isdecimal()) == ["1"]
    assert publish(unfit, root) == 2
    with pytest.raises(PromotionError, match="version 2 failed its verification, version 1 stays"):
        promote(root, unfit, rehearsal=rehearsal)
    assert [(state.version, state.state) for state in list_versions(root)] == [(1, "champion"), (2, "kept")]


def test_publishing_that_fails_between_the_two_models_leaves_neither_half(
    root: Path, exports: dict[int, Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RUNTIME_FILES[CLASSIFIER], "lost.py", root / "lost.py")  # a file of Tailor that is missing
    with pytest.raises(OSError, match=r"lost\.py"):
        promote(root, exports[2].export_dir, rehearsal=False)
    assert not any((root / model / "2").exists() for model in MODELS)


def test_promotion_removes_leftovers_of_a_killed_promotion(root: Path, exports: dict[int, Release]) -> None:
    for leftover in ("student/.3.removed", "classifier/.2.partial", "classifier/.9.old", "student/.mine"):
        (root / leftover / "folder").mkdir(parents=True)
    promote(root, exports[2].export_dir, rehearsal=False)
    hidden = [path.name for model in MODELS for path in (root / model).glob(".*")]
    assert hidden == [".mine"]


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda root: promote(root, 7), "holds no version 7; it has 1"),
        (lambda root: promote(root, 1, keep=1), "keep is 1; expected at least 2"),
        (lambda root: rollback(root), "holds no version before the champion 1 to roll back to"),
        (lambda root: rollback(root, 1), "version 1 is not older than the champion 1; use `tailor promote`"),
    ],
)
def test_version_that_cannot_be_meant_is_misuse(root: Path, misuse: Callable, message: str) -> None:
    with pytest.raises(InputError, match=message):
        misuse(root)
    assert read_champion(root).version == 1


def test_older_version_is_rolled_back_to_not_promoted(root: Path, exports: dict[int, Release]) -> None:
    promote(root, exports[2].export_dir, rehearsal=False)
    with pytest.raises(InputError, match="version 1 is older than the champion 2; use `tailor rollback 1`"):
        promote(root, 1)


def test_second_promotion_waits_for_the_first_and_then_gives_up(root: Path, exports: dict[int, Release]) -> None:
    with (
        locked(root),
        pytest.raises(RepositoryBusy, match="a promotion, a repair or the start of a server is under way"),
        locked(root, timeout=0.2),
    ):
        pass
    with locked(root, shared=True), locked(root, shared=True, timeout=0):
        pass
    assert promote(root, exports[2].export_dir, rehearsal=False).version == 2


@pytest.mark.end_to_end
def test_five_swaps_under_load_lose_no_request_and_mix_no_answers(
    serving: TritonServer, root: Path, exports: dict[int, Release]
) -> None:
    with Load(serving) as load:
        for number in range(2, 7):
            done = promote(root, exports[number].export_dir)
            assert (done.version, done.rehearsed, done.servers) == (number, True, (serving.grpc_url,))
            time.sleep(0.3)
        back = rollback(root)
        time.sleep(0.3)
    assert (back.version, back.rehearsed) == (5, False)
    assert_each_answer_is_its_versions(load, exports)
    assert sorted(set(load.versions())) == [1, 2, 3, 4, 5, 6]
    assert load.versions()[-1] == 5
    with Client(serving.grpc_url) as client:
        assert client.predict([picture(1)])[0].version == 5
        assert next(model.versions for model in client.status().models if model.name == "classifier") == (5,)


@pytest.mark.end_to_end
@pytest.mark.fault_case("server-starts-during-promotion")
def test_starting_server_waits_for_a_promotion_and_serves_its_version(root: Path, exports: dict[int, Release]) -> None:
    publish(exports[2].export_dir, root)
    server = TritonServer(root, http_port=0, grpc_port=0, metrics_port=0)
    starting = threading.Thread(target=server.start)
    try:
        with locked(root):
            starting.start()
            starting.join(3)
            assert starting.is_alive() and server.process_id is None
            for model in ("student", "classifier"):
                serve_versions(root, model, (1, 2))
        starting.join()
        assert [release.version for release in server.releases] == [1, 2]
        with Client(server.grpc_url) as client:
            assert client.predict([picture(1)])[0].version == 2
    finally:
        server.stop(at_once=True)


@pytest.mark.end_to_end
@pytest.mark.fault_case("killed-during-swap")
def test_repeated_promotion_loads_a_champion_that_a_killed_promotion_did_not_load(
    serving: TritonServer, root: Path, exports: dict[int, Release]
) -> None:
    publish(exports[2].export_dir, root)
    for model in ("student", "classifier"):
        serve_versions(root, model, (1, 2))
    with Client(serving.grpc_url) as client:
        assert client.predict([picture(1)])[0].version == 1
        done = promote(root, 2)
        assert (done.version, done.previous, done.servers) == (2, 2, (serving.grpc_url,))
        assert client.predict([picture(1)])[0].version == 2


def test_versions_of_killed_promotions_do_not_displace_former_champions(
    root: Path, exports: dict[int, Release]
) -> None:
    promote(root, exports[2].export_dir, rehearsal=False)
    for number in (3, 4, 5):  # published by promotions that were then killed
        assert publish(exports[number].export_dir, root) == number
    assert promote(root, exports[6].export_dir, rehearsal=False, keep=4).removed == (3, 4)
    assert [state.version for state in list_versions(root)] == [1, 2, 5, 6]
    assert promote(root, exports[7].export_dir, rehearsal=False, keep=4).removed == (5,)
    assert [state.version for state in list_versions(root)] == [1, 2, 6, 7]


def test_version_that_may_still_be_promoted_is_neither_counted_nor_deleted(
    root: Path, exports: dict[int, Release]
) -> None:
    for number in (2, 3, 4, 5):
        assert publish(exports[number].export_dir, root) == number
    assert promote(root, 2, rehearsal=False, keep=2).removed == ()
    assert promote(root, 3, rehearsal=False, keep=2).removed == (1,)
    assert [state.version for state in list_versions(root)] == [2, 3, 4, 5]
