"""Starting the real server: served repositories, and rejected ones."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tritonclient.grpc
import tritonclient.http
from conftest import ADMIN_KEY, Release, picture, write_export
from tritonclient.utils import InferenceServerException

from serving.client.sync_client import Client
from serving.repository.manifest import MANIFEST_NAME, STUDENT_NAME, ManifestError, sha256_of
from serving.repository.version_policy import serve_versions
from serving.repository.writer import write_repository
from serving.server.triton_server import TritonServer
from serving.shared.errors import InputError, RepositoryError, ServingError
from serving.triton.storage import logit_log
from tests.support.serve_process import ANY_PORT, shared_memory


def address(url: str) -> str:
    return url.partition("://")[2]


@pytest.mark.end_to_end
def test_log_is_printed_on_standard_error_with_verbose(repository: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "serving.commands",
        "serve",
        "--repository",
        str(repository),
        *ANY_PORT,
        "--verbose",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("ready")
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    assert "Started HTTPService" in errors
    assert process.returncode == 0


@pytest.mark.end_to_end
@pytest.mark.parametrize("name", ["ü – 図 b", "nfd-u\u0308"], ids=["not ASCII, blanks", "NFD"])
def test_a_repository_and_a_log_of_logits_are_served_at_a_path_that_is_not_ascii(
    release: Release, tmp_path: Path, name: str
) -> None:
    root = write_repository(release.export_dir, tmp_path / name / "repository")
    log = {logit_log.FOLDER_VARIABLE: str(tmp_path / name / "logits"), logit_log.SHARE_VARIABLE: "1"}
    with (
        TritonServer(root, http_port=0, grpc_port=0, metrics_port=0, environment=log) as server,
        Client(server.http_url) as client,
    ):
        answer = client.predict([picture(3)], "balanced")[0]
    expected = release.probabilities([picture(3)], 0.0)[0]
    assert answer.probabilities[0] == pytest.approx(expected.max(), rel=1e-4)
    assert list((tmp_path / name / "logits").glob("*.parquet"))


@pytest.mark.end_to_end
def test_two_releases_are_both_served_each_by_its_own_student(release: Release, tmp_path: Path) -> None:
    newer = Release(tmp_path / "export", write_export(tmp_path / "export", version=2))
    root = write_repository(release.export_dir, tmp_path / "repository")
    write_repository(newer.export_dir, tmp_path / "newer")
    for name in ("student", "classifier"):
        shutil.move(tmp_path / "newer" / name / "2", root / name / "2")
        serve_versions(root, name, (1, 2))
    with (
        TritonServer(root, http_port=0, grpc_port=0, metrics_port=0) as server,
        Client(server.http_url) as client,
    ):
        assert [found.version for found in server.releases] == [1, 2]
        for version, known in ((1, release), (2, newer)):
            answer = client.predict([picture(3)], "balanced", version=version)[0]
            expected = known.probabilities([picture(3)], 0.0)[0]
            assert answer.version == version
            assert answer.probabilities[0] == pytest.approx(expected.max(), rel=1e-4)
        assert client.predict([picture(3)])[0].version == 2


@pytest.mark.end_to_end
def test_loading_models_needs_the_admin_key(server: TritonServer) -> None:
    http = tritonclient.http.InferenceServerClient(address(server.http_url))
    grpc = tritonclient.grpc.InferenceServerClient(address(server.grpc_url))
    try:
        for client in (http, grpc):
            for forbidden in (
                lambda client=client: client.load_model("student"),
                lambda client=client: client.unload_model("student"),
                lambda client=client: client.get_inference_statistics(),
                lambda client=client: client.update_log_settings(settings={"log_verbose_level": 1}),
            ):
                with pytest.raises(InferenceServerException):
                    forbidden()
        granted = grpc.get_model_repository_index(headers={"triton-grpc-protocol-tailor-admin-key": ADMIN_KEY})
        assert {model.name for model in granted.models} == {"student", "classifier"}
    finally:
        http.close()
        grpc.close()
    assert ADMIN_KEY not in server.log.read_text()


@pytest.mark.end_to_end
def test_serving_changes_nothing_in_the_repository(server: TritonServer) -> None:
    version = server.repository / "classifier" / "1"
    assert {path.name for path in version.iterdir() if path.is_dir()} == set()
    assert not (version / "__pycache__").read_bytes()


@pytest.mark.end_to_end
def test_status_has_server_models_and_versions(server: TritonServer) -> None:
    for url in (server.http_url, server.grpc_url):
        with Client(url) as client:
            status = client.status()
        assert status.server_version == "2.51.0"
        assert [(model.name, model.versions) for model in status.models] == [("student", (1,)), ("classifier", (1,))]
        assert status.answers
        assert status.problem is None


@pytest.mark.end_to_end
def test_broken_model_makes_the_start_fail_with_the_log_and_nothing_left(repository: Path, tmp_path: Path) -> None:
    root = shutil.copytree(repository, tmp_path / "repository")
    (root / "classifier" / "1" / "model.py").write_text("import nowhere_to_be_found\n")
    server = TritonServer(root, http_port=0, grpc_port=0, metrics_port=0, log=tmp_path / "log")
    with pytest.raises(ServingError, match="ended with status 1 while it started") as caught:
        server.start()
    assert "nowhere_to_be_found" in (tmp_path / "log").read_text()
    assert str(caught.value).count("\n") > 1
    assert server.process_id is None
    assert shared_memory(server.prefix) == []


def test_tampered_graph_is_refused_before_anything_starts(repository: Path, tmp_path: Path) -> None:
    root = shutil.copytree(repository, tmp_path / "repository")
    path = root / "student" / "1" / "model.onnx"
    path.write_bytes(path.read_bytes() + b"\0")
    server = TritonServer(root, http_port=0, grpc_port=0, metrics_port=0)
    with pytest.raises(ManifestError, match=r"model\.onnx: sha256 is"):
        server.start()
    assert server.process_id is None


@pytest.mark.end_to_end
def test_graph_that_does_not_load_is_the_error_instead_of_the_end_of_tritons_log(
    release: Release, tmp_path: Path
) -> None:
    root = write_repository(release.export_dir, tmp_path / "repository")
    cut_graph(root, release.export_dir / STUDENT_NAME)
    server = TritonServer(root, http_port=0, grpc_port=0, metrics_port=0)
    with pytest.raises(RepositoryError, match=r"model\.onnx: ONNX Runtime cannot run it") as caught:
        server.start()
    assert "\n" not in str(caught.value)
    assert (server.process_id, shared_memory(server.prefix)) == (None, [])


def cut_graph(root: Path, graph: Path) -> None:
    """Truncate version 1's graph, and write its hash into the manifests."""
    path = root / "student" / "1" / "model.onnx"
    path.write_bytes(graph.read_bytes()[:-40])
    for model in ("student", "classifier"):
        manifest = root / model / "1" / MANIFEST_NAME
        content = json.loads(manifest.read_text())
        content["files"][STUDENT_NAME] = sha256_of(path)
        manifest.write_text(json.dumps(content))


@pytest.mark.parametrize("option", ["http_port", "grpc_port", "metrics_port"])
def test_port_in_use_is_named_with_its_option(repository: Path, option: str) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        ports = {"http_port": 0, "grpc_port": 0, "metrics_port": 0} | {option: port}
        flag = "--" + option.replace("_", "-")
        with pytest.raises(ServingError, match=f"{flag} {port}: the port is in use on 127.0.0.1"):
            TritonServer(repository, **ports).start()


def test_weak_admin_key_is_refused(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAILOR_ADMIN_KEY", "a,b")
    with pytest.raises(InputError, match="TAILOR_ADMIN_KEY is not usable"):
        TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0).start()


def test_log_that_cannot_be_written_is_named(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    server = TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0, log=tmp_path / "file" / "log")
    with pytest.raises(InputError, match="give a log file that can be written"):
        server.start()
