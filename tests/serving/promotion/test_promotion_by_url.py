"""Promotion on a server known only by URL and key, such as one in a container or on another machine."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Release

from serving.promotion.promotion import Promotion, PromotionError, promote, rollback
from serving.repository.lock import locked
from serving.repository.version_policy import present_versions, served_versions, version_folders
from serving.repository.writer import publish
from serving.server import model_control
from serving.server.leftovers import runtime_folders
from serving.server.local_tree import TREE, refresh_trees
from serving.server.model_control import ModelControl
from serving.server.running import RunningServer, server_by_address
from serving.server.supervisor import Supervisor
from serving.server.triton_server import TritonServer
from tests.support.steady_load import Load, assert_each_answer_is_its_versions

pytestmark = [pytest.mark.slow, pytest.mark.end_to_end]

MODELS = ("student", "classifier")


@pytest.fixture
def supervised(serving: TritonServer) -> Iterator[TritonServer]:
    """A server under a supervisor, as in `tailor serve`."""
    stopping, reports = threading.Event(), []
    thread = threading.Thread(target=Supervisor(serving, reports.append).run, args=(stopping,))
    thread.start()
    yield serving
    stopping.set()
    thread.join(30)
    assert reports == []


def by_url(root: Path, server: TritonServer) -> RunningServer:
    """The server as selected by `--url`, without access to its record."""
    return RunningServer(
        repository=str(root), http_url=None, grpc_url=server.grpc_url, admin_key=server.running.admin_key, prefix=None
    )


def tree_of(server: TritonServer) -> Path:
    """Return the model repository that Triton reads."""
    [runtime] = runtime_folders(server.prefix)
    return runtime / TREE


def shown(server: TritonServer, model: str) -> list[int]:
    return version_folders(tree_of(server), model)


def waited_for(change: Callable[[], Promotion], server: TritonServer) -> Promotion:
    """Start a change before the server's tree is correct, then correct the tree; return the change's result."""
    done: list[Promotion] = []
    root, thread = server.repository, threading.Thread(target=lambda: done.append(change()))
    before = served_versions(root, "student"), served_versions(root, "classifier")
    thread.start()
    while (
        served_versions(root, "student"),
        served_versions(root, "classifier"),
    ) == before:  # until just before the load
        assert thread.is_alive()
        time.sleep(0.05)
    thread.join(3)
    assert thread.is_alive() and done == []
    refresh_trees(root, server.prefix)
    thread.join(60)
    return done[0]


def await_tree(server: TritonServer, versions: list[int]) -> None:
    deadline = time.monotonic() + 10
    while [shown(server, model) for model in MODELS] != [versions, versions]:
        assert time.monotonic() < deadline, (versions, [shown(server, model) for model in MODELS])
        time.sleep(0.1)


def test_versions_are_promoted_pruned_and_rolled_back_by_address_alone(
    supervised: TritonServer, root: Path, exports: dict[int, Release]
) -> None:
    reached = [by_url(root, supervised)]
    with Load(supervised) as load:
        for number in (2, 3, 4):  # in direct succession: pruned versions may still be in the tree
            done = promote(root, exports[number].export_dir, servers=reached, rehearsal=False, keep=2)
            assert (done.version, done.servers) == (number, (supervised.grpc_url,))
        assert done.removed == (2,)
        time.sleep(0.3)
        assert rollback(root, servers=reached).version == 3
        time.sleep(0.3)
    assert_each_answer_is_its_versions(load, exports)
    assert sorted(set(load.versions())) == [1, 2, 3, 4]
    assert load.versions()[-1] == 3
    assert present_versions(root) == [3, 4]
    await_tree(supervised, [3, 4])
    assert all(path.exists() for path in tree_of(supervised).rglob("*"))  # no dangling link


def test_tree_follows_promotions_of_a_locked_repository(
    supervised: TritonServer, root: Path, exports: dict[int, Release]
) -> None:
    with locked(root):
        publish(exports[2].export_dir, root)
        await_tree(supervised, [1, 2])
        for model in MODELS:
            shutil.rmtree(root / model / "2")
        await_tree(supervised, [1])


def test_version_that_the_server_sees_late_is_waited_for(
    serving: TritonServer, root: Path, exports: dict[int, Release]
) -> None:
    publish(exports[2].export_dir, root)
    assert waited_for(lambda: promote(root, 2, servers=[by_url(root, serving)], rehearsal=False), serving).version == 2


def test_promotion_succeeds_if_the_server_detects_a_removed_version_late(
    serving: TritonServer, root: Path, exports: dict[int, Release]
) -> None:
    promote(root, exports[2].export_dir, rehearsal=False)
    assert promote(root, exports[3].export_dir, rehearsal=False, keep=2).removed == (1,)
    assert shown(serving, "student") == [2, 3] and (tree_of(serving) / "student" / "1").is_symlink()
    assert waited_for(lambda: rollback(root, servers=[by_url(root, serving)]), serving).version == 2


def test_server_of_another_repository_is_reported_and_no_version_remains(
    serving: TritonServer, root: Path, exports: dict[int, Release], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_control, "FOLDER_TIMEOUT", 1.0)
    other = shutil.copytree(root, tmp_path / "other")
    message = re.escape(f"has no version 2 of student; expected a server that runs on {other}")
    with pytest.raises(PromotionError, match=message):
        promote(other, exports[2].export_dir, servers=[by_url(other, serving)], rehearsal=False)
    assert served_versions(other, "classifier") == served_versions(other, "student") == (1,)
    assert present_versions(other) == [1]
    with ModelControl(serving.running, 10) as control:
        assert control.ready_versions("student") == control.ready_versions("classifier") == [1]


def test_server_by_address_uses_the_record_of_a_local_server(serving: TritonServer, root: Path) -> None:
    found = server_by_address(root, serving.grpc_url, "the key that was given")
    assert found == serving.running.model_copy(update={"admin_key": "the key that was given"})
    assert server_by_address(root, "grpc://127.0.0.1:9", "key").prefix is None
    assert server_by_address(root.parent, serving.grpc_url, "key").prefix is None
