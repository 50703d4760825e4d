"""The local server's view of a repository: a load call to Triton leaves other models and versions unchanged."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil
import pytest
from conftest import picture, write_export

from serving.client.sync_client import Client
from serving.promotion.promotion import promote
from serving.repository.manifest import MANIFEST_NAME, load_manifest
from serving.repository.version_policy import serve_versions
from serving.repository.writer import publish
from serving.server.leftovers import inference_processes
from serving.server.local_tree import link_tree
from serving.server.model_control import ModelControl
from serving.server.triton_server import TritonServer
from serving.shared.errors import ServingError
from tests.support.steady_load import Load

MODELS = ("student", "classifier")


@pytest.fixture
def root(repository: Path, tmp_path: Path) -> Path:
    return shutil.copytree(repository, tmp_path / "a repository")


@pytest.fixture
def second(tmp_path: Path) -> Path:
    write_export(tmp_path / "second", version=2)
    return tmp_path / "second"


def seen(tree: Path) -> dict[str, list[str]]:
    return {model: sorted(path.name for path in (tree / model).iterdir()) for model in MODELS}


def processes(server: TritonServer, version: int) -> set[int]:
    return {process.pid for process, _, number in inference_processes(server.prefix) if number == version}


def mapped(process: int) -> set[str]:
    """Return the files mapped by a process: its libraries and extension modules."""
    lines = Path(f"/proc/{process}/maps").read_text().splitlines()
    return {path for line in lines if (path := line[73:]).startswith("/") and not path.startswith("/dev/shm")}


def test_tree_shows_all_but_the_configs_of_other_servers(root: Path, tmp_path: Path) -> None:
    (root / "student" / ".2.new").mkdir()
    tree = link_tree(root, tmp_path)
    assert seen(tree) == {"student": ["1", "configs", "labels.txt"], "classifier": ["1", "configs"]}
    assert (tree / "student/1/model.onnx").samefile(root / "student/1/model.onnx")
    assert not (tree / "live_prior.json").is_symlink()
    (root / "live_prior.json").write_text("{}")
    assert (link_tree(root, tmp_path) / "live_prior.json").samefile(root / "live_prior.json")


def test_classifier_that_has_one_config_alone_shows_it(root: Path, tmp_path: Path) -> None:
    shutil.rmtree(root / "classifier" / "configs")  # the layout of an older Tailor
    assert seen(link_tree(root, tmp_path))["classifier"] == ["1", "config.pbtxt"]


def test_tree_follows_versions_that_come_and_go(root: Path, tmp_path: Path, second: Path) -> None:
    tree = link_tree(root, tmp_path)
    publish(second, root)
    assert seen(link_tree(root, tmp_path))["student"] == ["1", "2", "configs", "labels.txt"]
    for model in MODELS:
        shutil.rmtree(root / model / "1")
    link_tree(root, tmp_path)
    # A dangling link would prevent Triton from loading any model.
    assert seen(tree) == {"student": ["2", "configs", "labels.txt"], "classifier": ["2", "configs"]}
    assert all(path.exists() for path in tree.rglob("*"))


def test_link_tree_rejects_a_removed_repository_in_one_line(root: Path, tmp_path: Path) -> None:
    link_tree(root, tmp_path)
    shutil.rmtree(root / "classifier")
    with pytest.raises(ServingError, match=r"a repository/classifier: No such file or directory; check the repository"):
        link_tree(root, tmp_path)


def test_link_of_an_older_server_stays(root: Path, tmp_path: Path) -> None:
    (tmp_path / "repository").symlink_to(root)
    before = sorted((root / "student").iterdir())
    assert link_tree(root, tmp_path).is_symlink()
    assert sorted((root / "student").iterdir()) == before


@pytest.mark.slow
@pytest.mark.end_to_end
def test_swap_starts_only_the_new_version_and_loaded_versions_continue(
    serving: TritonServer, root: Path, second: Path
) -> None:
    before = processes(serving, 1)
    assert len(before) == 4
    assert promote(root, second).version == 2
    assert processes(serving, 1) == before
    assert len(processes(serving, 2)) == 4


@pytest.mark.slow
@pytest.mark.end_to_end
def test_another_default_strength_reloads_the_previous_version_without_failed_requests(
    serving: TritonServer, root: Path, second: Path
) -> None:
    manifest = load_manifest(second)
    (second / MANIFEST_NAME).write_text(manifest.model_copy(update={"strength": 0.25}).model_dump_json())
    before = {process for process, model, _ in inference_processes(serving.prefix) if model == "classifier"}
    with Load(serving) as load:
        assert promote(root, second).version == 2
        assert set(psutil.wait_procs(before, 20)[0]) == before
    assert load.failures == []
    assert set(load.versions()) == {1, 2}
    assert len(processes(serving, 1)) == len(processes(serving, 2)) == 4


@pytest.mark.slow
@pytest.mark.end_to_end
def test_first_answer_of_a_version_loads_no_more_code(serving: TritonServer, root: Path, second: Path) -> None:
    publish(second, root)
    with ModelControl(serving.running, 60) as control:
        for model in MODELS:
            serve_versions(root, model, (1, 2))
            control.load(model)
    before = {process: mapped(process) for process in processes(serving, 2)}
    with Client(serving.http_url) as client:
        for _ in range(4):  # reaches every instance
            assert client.predict([picture(1)])[0].version == 2
    assert {process: mapped(process) for process in before} == before
