"""Third-party clients through the gateway get the same results as Tailor's client from the server."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http
from conftest import SIZE, Release, picture
from tritonclient.utils import serialize_byte_tensor

from models.preprocess import preprocess
from serving.commands.serve import curl_example, json_example
from serving.gateway.nginx_process import GatewayProcess
from serving.server.triton_server import TritonServer
from tests.support.chromium import needs_chromium, started
from tests.support.documented import ROOT, commands, commands_in
from tests.support.running_gateway import running_gateway

pytestmark = pytest.mark.end_to_end

PIXELS = preprocess(picture(1), SIZE, SIZE)[None]
STRENGTH = np.full((1, 1), 0.5, dtype=np.float32)
ENCODED = np.array([[picture(1)]], dtype=np.object_)


@pytest.fixture(scope="module")
def gateway(server: TritonServer) -> Iterator[GatewayProcess]:
    with running_gateway(server) as running:
        yield running


@pytest.fixture(scope="module")
def logits(release: Release) -> np.ndarray:
    """Expected logits of `student` for PIXELS and STRENGTH, [1,C], from ONNX Runtime without Triton."""
    return release.logits([picture(1)], 0.5)


@pytest.fixture(scope="module")
def names(release: Release, logits: np.ndarray) -> list[bytes]:
    """Expected classes of `classifier` for ENCODED and STRENGTH."""
    best = np.argsort(-logits[0])[: release.manifest.top_k]
    return [release.manifest.classes[index].encode() for index in best]


def by_kserve(url: str, model: str, image: np.ndarray, binary: bool) -> dict[str, list[Any]]:
    inputs = []
    for name, array in (("image", image), ("strength", STRENGTH)):
        data = array.item() if array.dtype == np.object_ else array.tobytes()
        kind = {"O": "BYTES", "f": "FP32", "u": "UINT8"}[array.dtype.kind]
        entry = {"name": name, "shape": array.shape, "datatype": kind, "base64": base64.b64encode(data).decode()}
        inputs.append(entry)
    protocol = "grpc" if url.startswith("grpc") else "rest"
    task = {"url": url, "protocol": protocol, "model": model, "binary": binary, "inputs": inputs}
    script = ROOT / "tests/support/kserve_process.py"
    command = [sys.executable, str(script)]
    ended = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True, timeout=90, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize("binary", [False, True], ids=["typed", "binary"])
def test_kserves_client_gets_the_response_of_student(
    gateway: GatewayProcess, logits: np.ndarray, protocol: str, binary: bool
) -> None:
    url = gateway.http_url if protocol == "http" else gateway.grpc_url
    np.testing.assert_allclose(by_kserve(url, "student", PIXELS, binary)["logits"], logits[0], rtol=1e-5)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_kserves_client_gets_the_response_of_classifier(
    gateway: GatewayProcess, names: list[bytes], protocol: str
) -> None:
    url = gateway.http_url if protocol == "http" else gateway.grpc_url
    assert [name.encode() for name in by_kserve(url, "classifier", ENCODED, binary=True)["class"]] == names


@pytest.mark.parametrize("binary", [False, True], ids=["json", "binary"])
def test_tritons_client_gets_the_same_response_for_json_and_bytes(
    gateway: GatewayProcess, logits: np.ndarray, binary: bool
) -> None:
    image = tritonclient.http.InferInput("image", list(PIXELS.shape), "UINT8").set_data_from_numpy(PIXELS, binary)
    strength = tritonclient.http.InferInput("strength", [1, 1], "FP32").set_data_from_numpy(STRENGTH, binary)
    outputs = [tritonclient.http.InferRequestedOutput(name, binary_data=binary) for name in ("feature", "logits")]
    with tritonclient.http.InferenceServerClient(gateway.http_url.partition("://")[2]) as client:
        result = client.infer("student", [image, strength], outputs=outputs, request_id="a request/1")
    np.testing.assert_allclose(result.as_numpy("logits"), logits, rtol=1e-5)
    assert result.get_response()["id"] == "a request/1"
    assert {output["name"] for output in result.get_response()["outputs"]} == {"feature", "logits"}


def test_the_printed_curl_command_succeeds(gateway: GatewayProcess, names: list[bytes], tmp_path: Path) -> None:
    image = tmp_path / "an image.png"
    image.write_bytes(picture(1))
    ended = subprocess.run(
        ["sh", "-c", curl_example(gateway.http_url, image, 0.5)], capture_output=True, text=True, timeout=30, check=True
    )
    outputs = {output["name"]: output["data"] for output in json.loads(ended.stdout)["outputs"]}
    assert [name.encode() for name in outputs["class"]] == names


@pytest.mark.parametrize("through", ["gateway", "server"])
def test_the_printed_json_request_succeeds(
    server: TritonServer, gateway: GatewayProcess, release: Release, tmp_path: Path, through: str
) -> None:
    image = tmp_path / "an image's copy.png"
    image.write_bytes(picture(1))
    url = gateway.http_url if through == "gateway" else server.http_url
    commands = ["sh", "-ec", json_example(url, image)]
    ended = subprocess.run(commands, capture_output=True, text=True, timeout=30, check=True, cwd=tmp_path)
    request = json.loads((tmp_path / "request.json").read_text())
    assert [tensor["name"] for tensor in request["inputs"]] == ["image", "prior"]
    outputs = {output["name"]: output["data"] for output in json.loads(ended.stdout)["outputs"]}
    expected = release.probabilities([picture(1)], np.zeros(len(release.manifest.classes)))[0]
    assert outputs["index"] == np.argsort(-expected)[: release.manifest.top_k].tolist()
    np.testing.assert_allclose(outputs["probability"], np.sort(expected)[::-1][: len(outputs["index"])], rtol=1e-4)


def test_the_documented_json_request_is_that_of_serve() -> None:
    documented = commands(ROOT / "docs/serving.md")
    printed = json_example("http://127.0.0.1:8000", Path("cat.jpg"))
    assert commands_in("$ " + printed.replace("\ncurl", "\n$ curl")) == [
        one for one in documented if "request.json" in one
    ]


FETCH = """async ({path, head, data}) => {
    const bytes = new Uint8Array(data);
    const json = new TextEncoder().encode(head);
    const answer = await fetch(path, {
        method: "POST", body: new Blob([json, bytes]), headers: {"Inference-Header-Content-Length": String(json.length)},
    });
    return [answer.status, await answer.json()];
}"""


@needs_chromium
def test_fetch_in_a_browser_succeeds(gateway: GatewayProcess, names: list[bytes]) -> None:
    data = serialize_byte_tensor(ENCODED).item()
    head = {
        "inputs": [
            {"name": "image", "shape": [1, 1], "datatype": "BYTES", "parameters": {"binary_data_size": len(data)}},
            {"name": "strength", "shape": [1, 1], "datatype": "FP32", "data": [[0.5]]},
        ]
    }
    sent = {"path": "/v2/models/classifier/infer", "head": json.dumps(head), "data": list(data)}
    with started() as browser:
        page = browser.new_page()
        page.goto(f"{gateway.http_url}/v2")
        status, result = page.evaluate(FETCH, sent)
        page.close()
    assert status == 200, result
    assert [
        name.encode() for name in {output["name"]: output["data"] for output in result["outputs"]}["class"]
    ] == names
