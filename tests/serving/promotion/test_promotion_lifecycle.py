"""Publishing, verifying and promoting on disk: atomic for every fault of the challenger or the disk."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import write_export

from serving.promotion import lifecycle
from serving.promotion.promotion import PromotionError
from serving.repository.manifest import ManifestError, sha256_of
from serving.repository.promotion_log import read_changes
from serving.repository.release import list_versions
from serving.repository.version_policy import present_versions, version_before
from serving.server.triton_server import TritonServer
from serving.shared.errors import RepositoryError, ServingError
from tests.support.segmentation_release import write_segmentation_export

pytestmark = pytest.mark.slow

KEEP, TIMEOUT = 3, 30.0


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Three different exports, each with version 1 in its manifest, as written by `pipeline.export`."""
    folder = tmp_path_factory.mktemp("exports")
    for number in (1, 2, 3):
        write_export(folder / str(number), number)
        edit_manifest(folder / str(number), version=1)
    return folder


@pytest.fixture
def evidence(tmp_path):
    folder = tmp_path / "evidence"
    folder.mkdir()
    (folder / "decision.json").write_text('{"promote": true}')
    (folder / "report.html").write_text("<p>why</p>")
    return folder


@pytest.fixture
def repository(tmp_path, exports, evidence):
    """A repository with one promoted version."""
    go_live(tmp_path / "releases", exports / "1", evidence)
    return tmp_path / "releases"


def edit_manifest(export: Path, **changes: object) -> None:
    path = export / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def go_live(repository: Path, export: Path, evidence: Path, servers=()):
    version = lifecycle.publish(export, repository, evidence)
    lifecycle.verify(repository, version, TIMEOUT, rehearsal=False)
    return lifecycle.promote(repository, version, servers, KEEP, TIMEOUT)


def evidence_folder(repository: Path) -> Path:
    """Return the folder of the champion's evidence."""
    return repository / "classifier" / str(lifecycle.champion_or_none(repository).version)


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_the_first_version_is_nowhere_to_be_served_before_it_is_promoted(tmp_path, exports, evidence):
    repository = tmp_path / "releases"
    assert lifecycle.publish(exports / "1", repository, evidence) == 1
    assert lifecycle.verify(repository, 1, TIMEOUT, rehearsal=False) is False
    assert not repository.exists() and lifecycle.champion_or_none(repository) is None
    done = lifecycle.promote(repository, 1, (), KEEP, TIMEOUT)
    assert (done.version, done.previous) == (1, 0)
    (change,) = read_changes(repository)
    assert (change.action, change.version, change.previous) == ("promote", 1, 0)
    champion = lifecycle.champion_or_none(repository)
    assert champion.version == 1 and not lifecycle.first_version_folder(repository).exists()
    assert json.loads((evidence_folder(repository) / "decision.json").read_text()) == {"promote": True}


def test_a_first_version_left_by_a_killed_run_is_written_again(tmp_path, exports, evidence):
    repository = tmp_path / "releases"
    lifecycle.publish(exports / "2", repository, evidence)
    (lifecycle.first_version_folder(repository) / "student" / "1" / "model.onnx").write_bytes(b"half")
    assert go_live(repository, exports / "1", evidence).version == 1
    assert lifecycle.identity(lifecycle.champion_or_none(repository).manifest) == lifecycle.export_identity(
        exports / "1"
    )


def test_later_versions_carry_their_evidence_and_the_oldest_go(repository, exports, evidence):
    for number in (2, 3):
        assert go_live(repository, exports / str(number), evidence).version == number
    assert [(state.version, state.state) for state in list_versions(repository)][-1] == (3, "champion")
    assert (repository / "classifier" / "3" / "report.html").read_text() == "<p>why</p>"
    edit_manifest(shutil.copytree(exports / "3", evidence.parent / "again"), code_revision="again")
    assert go_live(repository, evidence.parent / "again", evidence).removed == (1,)


def test_releases_of_class_maps_are_promoted_with_their_evidence_and_rolled_back(tmp_path, evidence):
    repository = tmp_path / "maps"
    for number, scale in ((1, 20.0), (2, 10.0)):
        write_segmentation_export(tmp_path / str(number), scale=scale)
        assert go_live(repository, tmp_path / str(number), evidence).version == number
        assert json.loads((repository / "segmenter" / str(number) / "decision.json").read_text()) == {"promote": True}
    assert lifecycle.roll_back(repository, 1, (), KEEP, TIMEOUT).version == 1
    assert [(state.version, state.state) for state in list_versions(repository)] == [(1, "champion"), (2, "kept")]


def test_publishing_the_same_release_again_makes_no_second_version(repository, exports, evidence):
    assert lifecycle.publish(exports / "2", repository, evidence) == 2
    assert lifecycle.publish(exports / "2", repository, evidence) == 2
    assert lifecycle.publish(exports / "1", repository, evidence) == 1


def test_a_release_that_is_best_again_is_rolled_back_to(repository, exports, evidence):
    assert version_before(repository) is None
    go_live(repository, exports / "2", evidence)
    assert version_before(repository) == 1
    done = go_live(repository, exports / "1", evidence)
    assert (done.version, done.previous) == (1, 2)
    assert version_before(repository) is None
    assert [(change.action, change.version) for change in read_changes(repository)] == [
        ("promote", 1), ("promote", 2), ("rollback", 1)]  # fmt: skip
    assert lifecycle.champion_or_none(repository).version == 1


@pytest.mark.fault_case("wrong-answers-of-older-version")
def test_a_release_that_is_best_again_carries_the_new_decision_and_is_left_in_either_direction(
    repository, exports, evidence
):
    go_live(repository, exports / "2", evidence)
    (evidence / "decision.json").write_text('{"promote": true, "second": true}')
    assert present_versions(repository) == [1, 2]
    go_live(repository, exports / "1", evidence)
    folder = evidence_folder(repository)
    assert folder.name == "1" and json.loads((folder / "decision.json").read_text())["second"] is True
    assert not list(folder.glob(".*"))
    assert lifecycle.roll_back(repository, 2, (), KEEP, TIMEOUT).version == 2
    assert lifecycle.roll_back(repository, 1, (), KEEP, TIMEOUT).version == 1


def cut_graph(export: Path) -> None:
    """Truncate a graph and write its hash into the manifest."""
    graph = export / "student.onnx"
    graph.write_bytes(graph.read_bytes()[:-40])
    sums = json.loads((export / "manifest.json").read_text())["files"]
    edit_manifest(export, files=sums | {"student.onnx": sha256_of(graph)})


def changed_graph(export: Path) -> None:
    with (export / "student.onnx").open("ab") as stream:
        stream.write(b"\n")


def other_classes(export: Path) -> None:
    edit_manifest(export, classes=["wasp", "bee", "cat: big", "dög", "emu"])


def wrong_golden_answer(export: Path) -> None:
    path = export / "golden.json"
    golden = json.loads(path.read_text())
    golden[0]["probability"] = [0.9, 0.05, 0.05]
    path.write_text(json.dumps(golden))
    sums = json.loads((export / "manifest.json").read_text())["files"]
    edit_manifest(export, files=sums | {"golden.json": sha256_of(path)})


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (cut_graph, RepositoryError, "ONNX Runtime cannot run it"),
        (changed_graph, ManifestError, "the manifest has"),
        (other_classes, RepositoryError, "has other classes than"),
        (wrong_golden_answer, RepositoryError, "a golden request is answered wrongly"),
    ],
)
@pytest.mark.fault_case("corrupt-release", "wrong-hash", "other-classes")
def test_a_challenger_that_is_not_fit_changes_nothing_that_is_served(
    repository, exports, evidence, tmp_path, damage, error, message
):
    before = files(repository)
    bad = shutil.copytree(exports / "2", tmp_path / "bad")
    damage(bad)
    with pytest.raises(error, match=message):
        go_live(repository, bad, evidence)
    after = files(repository)
    assert {name: after[name] for name in before} == before
    assert lifecycle.champion_or_none(repository).version == 1


@pytest.mark.parametrize("size", [200, 3_000])
@pytest.mark.fault_case("disk-full-during-publish")
def test_a_file_that_grows_too_large_is_published_not_even_half(repository, exports, evidence, size):
    """A file size limit fails in the middle of a write, like a full disk."""
    before = files(repository)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            lifecycle.publish(exports / "2", repository, evidence)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(repository) == before
    assert go_live(repository, exports / "2", evidence).version == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a file system of its own")
@pytest.mark.fault_case("disk-full-during-publish")
def test_a_disk_that_fills_while_a_version_is_published_leaves_the_champion_and_room(tmp_path, exports, evidence):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount here")
    try:
        repository = disk / "releases"
        go_live(repository, exports / "1", evidence)
        filler = disk / "filler"
        free = shutil.disk_usage(disk).free
        filler.write_bytes(bytes(max(0, free - 24 * 1024)))
        before = files(repository)
        with pytest.raises(OSError, match="No space left"):
            lifecycle.publish(exports / "2", repository, evidence)
        assert files(repository) == before and lifecycle.champion_or_none(repository).version == 1
        filler.unlink()
        assert lifecycle.publish(exports / "2", repository, evidence) == 2
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.fault_case("killed-during-publish")
def test_publish_removes_leftovers_of_a_killed_publish(repository, exports, evidence):
    lifecycle.publish(exports / "2", repository, evidence)
    shutil.rmtree(repository / "classifier" / "2")  # killed between the two models
    (repository / "student" / ".3.partial").mkdir()
    (repository / "classifier" / ".1.removed").mkdir()
    assert lifecycle.publish(exports / "3", repository, evidence) == 2
    assert sorted(path.name for path in (repository / "student").iterdir()) == sorted(
        ["1", "2", "config.pbtxt", "configs", "labels.txt"]
    )


def test_a_folder_that_is_no_repository_is_not_written_into(tmp_path, exports, evidence):
    (tmp_path / "releases").mkdir()
    (tmp_path / "releases" / "thesis.txt").write_text("mine")
    with pytest.raises(RepositoryError, match=r"holds no student/config\.pbtxt"):
        lifecycle.publish(exports / "1", tmp_path / "releases", evidence)
    assert files(tmp_path / "releases") == {"thesis.txt": b"mine"}


@pytest.mark.end_to_end
@pytest.mark.fault_case("wrong-answers")
def test_a_champion_with_wrong_responses_is_detected_and_rolled_back(repository, exports, evidence, monkeypatch):
    monkeypatch.setenv("TAILOR_ADMIN_KEY", "a-key-known-to-the-tests")
    server = TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0).start()
    try:
        servers = lifecycle.servers_of(repository, None)
        assert [found.grpc_url for found in servers] == [server.grpc_url]
        assert lifecycle.servers_of(repository, server.grpc_url) == servers  # found by its URL only
        assert go_live(repository, exports / "2", evidence, servers).servers == (server.grpc_url,)
        lifecycle.watch(repository, 2, servers, 0.0)
        # Change its golden answers during the watch, as if the graph returned other results.
        wrong = repository / "classifier" / "2" / "golden.json"
        golden = json.loads(wrong.read_text())
        golden[0]["probability"] = golden[0]["probability"][::-1]
        wrong.write_text(json.dumps(golden))
        with pytest.raises(ServingError, match="answers a golden request wrongly"):
            lifecycle.watch(repository, 2, servers, 5.0)
        assert lifecycle.roll_back(repository, 1, servers, KEEP, TIMEOUT).version == 1
        lifecycle.watch(repository, 1, servers, 0.0)
        # A version that does not load does not become champion, and the previous one stays served.
        lifecycle.publish(exports / "3", repository, evidence)
        model = repository / "classifier" / "3" / "model.py"
        model.write_text(
            model.read_text().replace("def initialize(self, args):", "def initialize(self, args):\n        1 / 0")
        )
        with pytest.raises(PromotionError, match="version 3 could not be loaded, version 1 is still served"):
            lifecycle.promote(repository, 3, servers, KEEP, TIMEOUT)
        lifecycle.watch(repository, 1, servers, 0.0)
    finally:
        server.stop(at_once=True)
