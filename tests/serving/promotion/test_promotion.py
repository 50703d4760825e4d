"""Promotion and rollback: on disk, and in a real server under continuous requests."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import Release, picture

from models.preprocess import preprocess
from serving.client.sync_client import Client
from serving.promotion import promotion, swap
from serving.promotion.promotion import PromotionError, promote, rollback
from serving.repository.lock import RepositoryBusy, locked
from serving.repository.manifest import GOLDEN_NAME, MANIFEST_NAME, STUDENT_NAME, sha256_of
from serving.repository.promotion_log import LOG_NAME
from serving.repository.release import list_versions, read_champion
from serving.repository.version_policy import serve_versions, served_versions
from serving.repository.writer import publish
from serving.server import model_control
from serving.server.leftovers import inference_processes
from serving.server.triton_server import TritonServer
from serving.shared.errors import InputError
from serving.transport.sync_transport import Transport
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


def test_rollback_goes_to_the_newest_on_disk_where_no_promotion_was_recorded(
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
def test_export_that_fails_its_trial_is_withdrawn_unless_it_was_there_before(
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
    root: Path, exports: dict[int, Release]
) -> None:
    (root / "classifier" / ".2.partial").write_text("a file where the folder would be written")
    with pytest.raises(OSError, match=r"\.2\.partial"):
        promote(root, exports[2].export_dir, rehearsal=False)
    assert not (root / "student" / "2").exists()


def test_promotion_clears_what_a_killed_one_left(root: Path, exports: dict[int, Release]) -> None:
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
        (lambda root: rollback(root), "holds no version before the champion 1; there is no version to roll back to"),
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
def test_server_that_starts_waits_for_a_promotion_and_serves_what_it_made(
    root: Path, exports: dict[int, Release]
) -> None:
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
def test_champion_that_a_killed_promotion_told_no_server_of_is_loaded_when_it_is_promoted_again(
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


def corrupt_graph(root: Path) -> None:
    path = root / "student" / "2" / "model.onnx"
    path.write_bytes(path.read_bytes()[:-40])


def never_finish_loading(root: Path) -> None:
    path = root / "classifier" / "2" / "model.py"
    path.write_text("import time\nwhile True:\n    time.sleep(1)\n")


def fail_to_load(root: Path) -> None:
    path = root / "classifier" / "2" / "model.py"
    path.write_text(
        path.read_text().replace("def initialize(self, args):", "def initialize(self, args):\n        1 / 0")
    )


def kill_its_stub(root: Path) -> None:
    path = root / "student" / "2" / "model.py"
    path.write_text(path.read_text() + "\nos._exit(3)\n")


def lose_a_file(root: Path) -> None:
    (root / "classifier" / "2" / "prior.py").unlink()


def golden_of_another(root: Path) -> None:
    """Write a wrong golden answer with a correct hash."""
    path = root / "classifier" / "2" / GOLDEN_NAME
    golden = json.loads(path.read_text())
    golden[0]["probability"] = golden[0]["probability"][::-1]
    path.write_text(json.dumps(golden))
    for manifest in (root / "classifier" / "2" / MANIFEST_NAME, root / "student" / "2" / MANIFEST_NAME):
        content = json.loads(manifest.read_text())
        content["files"][GOLDEN_NAME] = sha256_of(path)
        manifest.write_text(json.dumps(content))


BROKEN = [corrupt_graph, never_finish_loading, fail_to_load, kill_its_stub, golden_of_another]


@pytest.mark.end_to_end
def test_broken_versions_are_refused_while_the_champion_answers(
    serving: TritonServer, root: Path, exports: dict[int, Release], tmp_path: Path
) -> None:
    good = tmp_path / "good"
    publish(exports[2].export_dir, root)
    shutil.copytree(root, good)
    with Load(serving) as load:
        for damage in BROKEN:
            damage(root)
            with pytest.raises(PromotionError, match="version 2 failed its verification, version 1 stays") as caught:
                promote(root, 2, timeout=4)
            assert "2" in str(caught.value), damage
            for model in ("student", "classifier"):
                shutil.copytree(good / model / "2", root / model / "2", dirs_exist_ok=True)
        lose_a_file(root)
        with pytest.raises(InputError, match="holds no version 2"):
            promote(root, 2)
        shutil.copytree(good / "classifier" / "2", root / "classifier" / "2", dirs_exist_ok=True)
        assert set(load.versions()) == {1}
        assert read_champion(root).version == 1
        assert promote(root, 2).version == 2
    assert_each_answer_is_its_versions(load, exports)


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (golden_of_another, "student 2 answers a golden request wrongly"),
        (never_finish_loading, "the load of classifier did not end within 4 s"),
        (fail_to_load, "Triton did not load classifier"),
    ],
)
def test_version_that_breaks_only_in_the_champions_server_is_taken_back(
    serving: TritonServer,
    root: Path,
    exports: dict[int, Release],
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable,
    message: str,
) -> None:
    publish(exports[2].export_dir, root)
    damage(root)
    monkeypatch.setattr(promotion, "rehearse", lambda *_arguments: True)  # as if it had gone well
    with Load(serving) as load:
        with pytest.raises(PromotionError, match=f"version 2 does not serve, version 1 stays: .*{message}"):
            promote(root, 2, timeout=4)
        assert served_versions(root, "classifier") == served_versions(root, "student") == (1,)
        time.sleep(0.3)
        assert set(load.versions()) == {1}  # requests without a version never reached it
        # Remains, such as a hanging inference process, do not prevent the next promotion.
        shutil.rmtree(root / "classifier" / "2")
        assert promote(root, exports[3].export_dir, timeout=20).version == 3
    assert load.failures == []
    assert load.versions()[-1] == 3


@pytest.mark.end_to_end
def test_champion_and_the_version_before_it_both_answer_by_number(
    serving: TritonServer, root: Path, exports: dict[int, Release]
) -> None:
    promote(root, exports[2].export_dir, rehearsal=False)
    image = preprocess(picture(4), 8, 8)[None]
    for version in (1, 2):
        with Client(serving.http_url) as client:
            assert client.predict([picture(4)], version=version)[0].version == version
        transport = Transport(serving.grpc_url, timeout=10)
        inputs = {"image": image, "strength": np.zeros((1, 1), dtype=np.float32)}
        answered, by = transport.infer("student", inputs, {"logits": 0}, str(version))
        transport.close()
        assert by == version
        np.testing.assert_allclose(answered["logits"], exports[version].logits([picture(4)]), rtol=1e-5, atol=1e-5)


@pytest.mark.end_to_end
def test_swap_that_is_interrupted_leaves_the_champion(
    serving: TritonServer, root: Path, exports: dict[int, Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(swap, "check_student", interrupted)
    with pytest.raises(KeyboardInterrupt):
        promote(root, exports[2].export_dir, rehearsal=False)
    assert [(state.version, state.state) for state in list_versions(root)] == [(1, "champion")]
    with Client(serving.http_url) as client:
        assert client.predict([picture(1)])[0].version == 1


@pytest.mark.end_to_end
def test_policies_go_back_also_where_the_server_dies_while_a_hanging_load_is_ended(
    serving: TritonServer, root: Path, exports: dict[int, Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(exports[2].export_dir, root)
    never_finish_loading(root)

    def processes_of_a_dying_server(prefix: str) -> list[psutil.Process]:
        stubs = [stub for stub, _, _ in inference_processes(prefix)]
        with contextlib.suppress(psutil.NoSuchProcess):  # called again for the other model
            server = psutil.Process(serving.process_id)
            server.kill()
            server.wait(10)
        return stubs

    monkeypatch.setattr(promotion, "rehearse", lambda *_arguments: True)  # as if it had gone well
    monkeypatch.setattr(model_control, "processes_of", processes_of_a_dying_server)
    with pytest.raises(PromotionError, match=r"version 1 stays: .*the load of classifier did not end within 4 s"):
        promote(root, 2, timeout=4)
    assert served_versions(root, "classifier") == served_versions(root, "student") == (1,)
