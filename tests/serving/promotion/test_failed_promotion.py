"""A version that fails its verification or its load: the champion serves without interruption."""

from __future__ import annotations

import contextlib
import json
import shutil
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
from serving.promotion.promotion import PromotionError, promote
from serving.repository.manifest import GOLDEN_NAME, MANIFEST_NAME, sha256_of
from serving.repository.release import list_versions, read_champion
from serving.repository.version_policy import served_versions
from serving.repository.writer import publish
from serving.server import model_control
from serving.server.leftovers import inference_processes
from serving.server.triton_server import TritonServer
from serving.shared.errors import InputError
from serving.transport.sync_transport import Transport
from tests.support.steady_load import Load, assert_each_answer_is_its_versions

pytestmark = pytest.mark.slow


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
def test_version_that_fails_only_in_the_champions_server_is_rolled_back(
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
        with pytest.raises(
            PromotionError, match=f"version 2 could not be loaded, version 1 is still served: .*{message}"
        ):
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
    with pytest.raises(
        PromotionError, match=r"version 1 is still served: .*the load of classifier did not end within 4 s"
    ):
        promote(root, 2, timeout=4)
    assert served_versions(root, "classifier") == served_versions(root, "student") == (1,)
