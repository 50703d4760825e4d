"""Weights from a hub: processes with HF_ENDPOINT load them from a server on the loopback address that acts as a hub."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading

import pytest
import safetensors.torch

from models.networks.backbones import build_backbone
from pipeline.shared.artifacts import sha256_of
from tests.support.making import ROOT
from tests.support.small_encoder import TINY

COMMIT = "a" * 40
# Loads the encoder once for each case of the list in argv[1]; prints the source and sha256 of its record, or the error.
CASES = """
import json, sys
from pipeline.model_io.encoder import describe, load_encoder
from pipeline.params import EncoderParams, ImageParams
from pipeline.shared.errors import ParamsError
listed = describe(EncoderParams(name="timm/test_vit"))
image = ImageParams(
    size=32, resize_to=32, mean=list(listed.mean), std=list(listed.std), interpolation=listed.interpolation
)
answers = []
for case in json.loads(sys.argv[1]):
    try:
        record = load_encoder(EncoderParams(name="timm/test_vit", licence=listed.accept or None, **case), image).record
        answers.append([record.source, record.sha256])
    except ParamsError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


@pytest.fixture(name="weights")
def _weights(tmp_path):
    path = tmp_path / "tiny.safetensors"
    safetensors.torch.save_file(build_backbone(f"timm/{TINY}").network.state_dict(), path)
    return path


@pytest.fixture(name="hub")
def _hub(weights):
    """A server that has owner/tiny@v1; owner/closed needs a key, owner/cut ends early, owner/plain is no hub."""
    content, requests = weights.read_bytes(), []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            requests.append(self.path)
            repository, file = self.path[1:].split("/resolve/")
            exists = file in ("v1/model.safetensors", f"{COMMIT}/model.safetensors")
            status = {"owner/closed": 401}.get(repository, 200 if exists else 404)
            self.send_response(status)
            if repository != "owner/plain":
                self.send_header("X-Repo-Commit", COMMIT)
            if status == 404:
                self.send_header("X-Error-Code", "RevisionNotFound" if file.startswith("v2") else "EntryNotFound")
            if status == 401:
                self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("ETag", f'"{repository}"')
            self.send_header("Content-Length", str(len(content) if status == 200 else 0))
            self.end_headers()
            return status == 200

        def do_GET(self):
            if self.do_HEAD():
                self.wfile.write(content[: 5000 if "/cut/" in self.path else None])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", requests
        server.shutdown()


def answers(endpoint: str, cache, *cases: dict) -> list:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", CASES, json.dumps(cases)], env=environment, capture_output=True, text=True, check=True
    )
    assert not done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_weights_are_downloaded_once_checked_and_recorded_and_each_fault_is_one_line(hub, weights, tmp_path):
    (endpoint, requests), sha256 = hub, sha256_of(weights)

    def case(repository: str, **changes) -> dict:
        return {"weights": f"hf://owner/{repository}", "sha256": sha256, "download": True, **changes}

    loaded, again, other, revision, closed, plain, cut, above = answers(
        endpoint, tmp_path / "cache",
        case("tiny@v1"), case("tiny@v1", download=False), case("tiny@v1", sha256="0" * 64), case("tiny@v2"),
        case("closed@v1"), case("plain@v1"), case("cut@v1"), case("tiny@../../x"),
    )  # fmt: skip
    assert loaded == again == ["hf://owner/tiny@v1", sha256]
    assert sum(path.startswith("/owner/tiny/resolve/v1/") for path in requests) >= 2  # HEAD and GET
    assert other.startswith(f"encoder.sha256 is {'0' * 64}, but {tmp_path}") and f"has {sha256}" in other
    for message, reason in (
        (revision, "v2"),
        (closed, "401"),
        (plain, "does not seem to be served by"),
        (cut, ""),
        (above, "../x"),
    ):
        assert message.startswith("encoder.weights: hf://owner/") and "\n" not in message and reason in message
        assert message.endswith("check the address and the network, or give a file as encoder.weights")


def test_an_unreachable_hub_is_one_line(tmp_path):
    given = {"weights": "hf://owner/tiny@v1", "sha256": "0" * 64, "download": True}
    (message,) = answers("http://127.0.0.1:9", tmp_path, given)
    assert message.startswith("encoder.weights: hf://owner/tiny@v1: the hub cannot be reached (")
    assert "refused" in message and "\n" not in message and "check the address and the network" in message
