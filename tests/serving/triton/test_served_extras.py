"""Prediction sets and decisions on the real server: HTTP, gRPC and JSON, and a release without the inputs' outputs."""

from __future__ import annotations

import base64
import json
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest
from conftest import CLASSES, picture
from test_explain import explained_export
from test_extras import KEYS
from test_taxonomy_answers import TREE

from serving.client import Client, Extras
from serving.repository.writer import write_repository
from serving.server.triton_server import TritonServer
from serving.transport.failures import RequestRejected

pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A server of a release whose manifest has a default coverage, with a feature index and a map."""
    folder = tmp_path_factory.mktemp("extras")
    explained_export(folder / "export", **KEYS | {"sets": KEYS["sets"] | {"coverage": 0.5}, "taxonomy": TREE})
    with TritonServer(
        write_repository(folder / "export", folder / "repository"), http_port=0, grpc_port=0, metrics_port=0
    ) as server:
        yield server


def test_both_protocols_and_json_return_the_same_extras(served: TritonServer) -> None:
    images, extras = [picture(seed) for seed in range(5)], Extras(0.9, {"emu": 20}, 0.4, 0.2, 0.8, explain=3)
    with Client(served.http_url) as http, Client(served.grpc_url) as grpc:
        answers = http.predict(images, "train", extras=extras)
        assert answers == grpc.predict(images, "train", extras=extras)
    assert all(answer.set and answer.decision and answer.unknown is not None for answer in answers)
    assert all(answer.node and answer.node.name for answer in answers)
    assert all(len(answer.nearest) == 3 and answer.nearest[0].thumbnail for answer in answers)
    assert all(np.shape(answer.activation_map) == (2, 2) for answer in answers)
    tensors = [
        ("image", "BYTES", "data:image/png;base64," + base64.b64encode(images[0]).decode()),
        ("prior", "BYTES", "train"),
        ("coverage", "FP32", 0.9),
        ("costs", "BYTES", "[1, 1, 1, 1, 20]"),
        ("ask", "FP32", 0.4),
    ]
    body = {"inputs": [{"name": n, "datatype": t, "shape": [1, 1], "data": [value]} for n, t, value in tensors]}
    call = urllib.request.Request(f"{served.http_url}/v2/models/classifier/infer", json.dumps(body).encode())
    with urllib.request.urlopen(call, timeout=20) as response:
        outputs = {output["name"]: output["data"] for output in json.load(response)["outputs"]}
    assert outputs["set"] == list(answers[0].set) and outputs["set_size"] == [len(answers[0].set)]
    assert outputs["decision"] == [answers[0].decision.name or ""]


def test_a_client_gets_the_defaults_of_the_release_and_no_more(served: TritonServer) -> None:
    for url in (served.http_url, served.grpc_url):
        with Client(url) as client:
            [default] = client.predict([picture(1)])
            [named] = client.predict([picture(1)], extras=Extras(0.5))
        assert default.set == named.set != None and default.decision is None  # noqa: E711


def test_a_release_without_defaults_answers_as_before_and_refuses_a_coverage(server: TritonServer) -> None:
    for url in (server.http_url, server.grpc_url):
        with Client(url) as client:
            [answer] = client.predict([picture(1)])
            assert answer.set is None and answer.decision is None and answer.classes[0] in CLASSES
            with pytest.raises(RequestRejected, match="coverage: this release has no prediction sets"):
                client.predict([picture(1)], extras=Extras(0.9))


def test_outputs_that_a_response_lacks_may_be_requested(server: TritonServer) -> None:
    """As a client does that still knows the defaults of the release before."""
    with Client(server.http_url) as http, Client(server.grpc_url) as grpc:
        for client in (http, grpc):
            client._run(client._sequence.limits(), client._deadline())
            client._sequence._outputs = ("set", "set_size", "decision")
            [answer] = client.predict([picture(1)])
            assert answer.set is None and answer.decision is None
