"""Ending a hanging load when the inference process or the server has just exited."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from serving.server import model_control
from serving.server.leftovers import new_prefix
from serving.server.model_control import ModelControl
from serving.server.running import RunningServer
from serving.shared.errors import ServingError
from serving.shared.ports import choose_ports

pytestmark = pytest.mark.slow


@pytest.fixture
def control() -> Iterator[ModelControl]:
    """ModelControl of a server that has exited."""
    port = choose_ports("127.0.0.1", {"--grpc-port": 0})["--grpc-port"]
    server = RunningServer(
        repository="none", http_url=None, grpc_url=f"grpc://127.0.0.1:{port}", admin_key="key", prefix=new_prefix()
    )
    with ModelControl(server, 5) as control:
        yield control


@pytest.fixture
def stub(control: ModelControl) -> Iterator[subprocess.Popen[bytes]]:
    """A process that looks like the inference process of classifier 2."""
    command = [
        sys.executable,
        "-c",
        "import time; time.sleep(60)",
        f"/tmp/{control.server.prefix}/classifier/2/model.py",
    ]
    process = subprocess.Popen(command)
    yield process
    process.kill()
    process.wait()


def test_stub_that_has_just_ended_is_no_obstacle(
    control: ModelControl, stub: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = psutil.Process(stub.pid)
    stub.kill()
    stub.wait()
    monkeypatch.setattr(model_control, "processes_of", lambda _prefix: [found])
    assert control.end_hanging_load("classifier", 2) is False


def test_exited_server_is_reported_in_one_line_after_its_inference_process_was_killed(
    control: ModelControl, stub: subprocess.Popen[bytes]
) -> None:
    with pytest.raises(ServingError, match=control.server.grpc_url) as caught:
        control.end_hanging_load("classifier", 2)
    assert "\n" not in str(caught.value)
    assert stub.wait(5) == -9
