"""The container's entry point: it serves requests, exports its metrics, and swaps versions under load."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import ADMIN_KEY, Release, picture, write_export, write_graph

from serving.client.sync_client import Client
from serving.promotion.promotion import promote, rollback
from serving.repository.manifest import sha256_of
from serving.server.model_control import ModelControl
from serving.server.running import RunningServer
from serving.shared.atomic import write_file
from serving.shared.errors import ServingError
from serving.transport.sync_transport import RequestRejected, Transport
from tests.support.container import DEPLOY, Container, EndedWhileStarting, backends, metrics_text, running_container
from tests.support.steady_load import Load, assert_each_answer_is_its_versions
from tests.support.watched import OBSERVABILITY, expressions

pytestmark = pytest.mark.end_to_end


def names_of(url: str) -> set[str]:
    return set(re.findall(r"^# TYPE (\S+)", metrics_text(url), re.MULTILINE))


def test_the_container_entry_serves_with_the_metrics_of_the_dashboard(repository: Path, tmp_path: Path) -> None:
    """Run the entry point with the local server instead of NGC's, and compare its metrics with the dashboard's."""
    with running_container(repository, tmp_path, ADMIN_KEY) as server:
        with Client(server.http_url) as client:
            assert client.predict([picture(1)], "train")[0].version == 1
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{server.http_url}/v2/logging", timeout=5)
        transport = Transport(server.http_url, timeout=10)
        with pytest.raises(RequestRejected, match="image is not"):
            transport.infer("classifier", {"image": np.array([[b"text"]], dtype=np.object_)}, {"index": 0})
        transport.close()
        deadline = time.monotonic() + 10
        while "tailor_refused_total" not in (shown := names_of(server.metrics_url)):
            assert time.monotonic() < deadline, shown
            time.sleep(0.2)
    alerts = (OBSERVABILITY / "alerts.yaml").read_text()
    asked_for = set(re.findall(r"\b(?:nv|tailor)_[a-z_]+", " ".join(expressions()) + alerts))
    assert len(asked_for) > 10
    assert asked_for <= shown


def health(server: Container, *options: str, metrics_url: str | None = None) -> tuple[int, str]:
    """Run the container's health check with a timeout of two seconds; return its exit status and output."""
    code = "import sys, healthcheck as h; h.TIMEOUT = h.LIVE_TIMEOUT = 2.0; sys.exit(h.main(*sys.argv[1:]))"
    command = [sys.executable, "-c", code, *options, server.http_url, metrics_url or server.metrics_url]
    ended = subprocess.run(command, cwd=DEPLOY, capture_output=True, text=True, check=False)
    return ended.returncode, ended.stderr


def test_a_busy_server_is_alive_and_one_that_answers_no_request_is_not(repository: Path, tmp_path: Path) -> None:
    root, seconds = shutil.copytree(repository, tmp_path / "repository"), tmp_path / "seconds"
    path, begin = root / "classifier" / "1" / "model.py", "        parsed = {}\n"
    assert begin in path.read_text()
    path.write_text(
        path.read_text().replace(begin, f"        time.sleep(float(open({str(seconds)!r}).read()))\n{begin}")
    )
    write_file(seconds, "0")
    (tmp_path / "run").mkdir()
    with running_container(root, tmp_path / "run", ADMIN_KEY) as server, ThreadPoolExecutor(20) as pool:
        assert health(server) == health(server, "--live") == (0, "")
        write_file(seconds, "0.4")

        def ask() -> None:
            with Client(server.http_url, timeout=60) as client:
                while seconds.read_text() == "0.4":
                    client.predict([picture(1)] * 8)  # a whole batch, processed one after another

        asked = [pool.submit(ask) for _ in range(20)]
        time.sleep(2)
        unready, alive = health(server), health(server, "--live")
        write_file(seconds, "12")
        time.sleep(2)
        hung = health(server, "--live")
        unknown = health(server, "--live", metrics_url="http://127.0.0.1:9/metrics")
        write_file(seconds, "0")
        assert [each.exception() for each in asked] == [None] * 20
    assert unready[0] == 1 and "timed out" in unready[1]
    assert alive[0] == 0 and alive[1].endswith("it is busy with other requests\n")
    assert hung[0] == 1 and hung[1].endswith("it answers no other requests either\n")
    assert unknown[0] == 0  # then Triton's readiness counts


def test_versions_are_swapped_in_a_container_as_in_the_local_server(
    repository: Path, release: Release, tmp_path: Path
) -> None:
    exports = {1: release, 2: Release(tmp_path / "2", write_export(tmp_path / "2", version=2))}
    root = shutil.copytree(repository, tmp_path / "repository")
    (tmp_path / "run").mkdir()
    with running_container(root, tmp_path / "run", ADMIN_KEY) as server, Load(server) as load:
        reached = RunningServer(
            repository=str(root), http_url=None, grpc_url=server.grpc_url, admin_key=ADMIN_KEY, prefix=None
        )
        done = promote(root, exports[2].export_dir, servers=[reached])
        assert (done.version, done.rehearsed, done.servers) == (2, True, (server.grpc_url,))
        time.sleep(0.3)
        assert rollback(root, servers=[reached]).version == 1
        time.sleep(0.3)
    assert_each_answer_is_its_versions(load, exports)
    assert sorted(set(load.versions())) == [1, 2]
    assert load.versions()[-1] == 1


def test_a_changed_graph_is_rejected_by_classifier_although_student_loads_it(repository: Path, tmp_path: Path) -> None:
    root = shutil.copytree(repository, tmp_path / "repository")
    path, manifest = (root / "student" / "1" / name for name in ("model.onnx", "manifest.json"))
    refused = rf"student/1/model\.onnx: sha256 is [0-9a-f]{{12}}\.\.\., manifest\.json has {sha256_of(path)[:12]}"
    for name in ("run", "again"):
        (tmp_path / name).mkdir()
    with running_container(root, tmp_path / "run", ADMIN_KEY) as server:
        write_graph(path, seed=2)  # runs, with other results
        if not backends():  # the replacement of the onnxruntime backend must not check the graph's hash either
            content = json.loads(manifest.read_text())
            content["files"]["student.onnx"] = sha256_of(path)
            manifest.write_text(json.dumps(content))
        reached = RunningServer(
            repository=str(root), http_url=None, grpc_url=server.grpc_url, admin_key=ADMIN_KEY, prefix=None
        )
        with ModelControl(reached, timeout=30) as control:
            control.unload("classifier")
            control.load("student")
            with pytest.raises(ServingError, match=refused) as caught:
                control.load("classifier")
            assert "\n" not in str(caught.value)
    with (
        pytest.raises(EndedWhileStarting, match=rf"'classifier' version 1.*{refused}"),
        running_container(root, tmp_path / "again", ADMIN_KEY),
    ):
        pass
