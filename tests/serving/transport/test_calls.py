"""Decoding of responses without a connection: valid predictions, and errors for anything else."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from conftest import picture
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from serving.client.requests import OUTPUTS, RequestSequence, image_call
from serving.shared.errors import ServingError
from serving.transport.messages import (
    HEADER_LENGTH,
    Answer,
    Infer,
    InvalidResponse,
    ModelConfig,
    ModelMetadata,
    ServerMetadata,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
TENSOR = st.fixed_dictionaries(
    {"name": st.sampled_from([*OUTPUTS, "x"]), "datatype": st.sampled_from(["BYTES", "FP32", "INT32", "BOOL", "?"])},
    optional={"shape": JSON | st.just([1, 3]), "parameters": JSON | st.just({"binary_data_size": 12}), "data": JSON},
)
INFERENCE = st.fixed_dictionaries(
    {"model_version": JSON | st.just("1")}, optional={"outputs": JSON | st.lists(TENSOR, max_size=4)}
)


def call() -> Infer:
    return image_call([picture(1)], "strength", np.zeros(1, np.float32), None)


@pytest.mark.slow
@given(
    body=JSON | INFERENCE, tail=st.binary(max_size=60), length=st.none() | st.integers(-5, 400) | st.text(max_size=4)
)
def test_any_http_response_is_decoded_or_rejected(body: Any, tail: bytes, length: object) -> None:
    head = json.dumps(body).encode()
    for header in (str(len(head)), length):
        headers = {} if header is None else {HEADER_LENGTH: str(header)}
        try:
            answer = call().read_http(headers, head + tail)
        except InvalidResponse:
            continue
        assert isinstance(answer, Answer)
        assert set(answer.outputs) == set(OUTPUTS)


@given(data=st.binary(max_size=200))
def test_any_grpc_response_is_decoded_or_rejected(data: bytes) -> None:
    for metadata_call in (call(), ModelConfig("m"), ModelMetadata("m"), ServerMetadata()):
        try:
            metadata_call.read_message(data)
        except InvalidResponse:
            continue


@given(
    shape=st.lists(st.integers(-3, 9), max_size=3),
    datatype=st.sampled_from(["BYTES", "FP32", "INT32", "?"]),
    raw=st.lists(st.binary(max_size=40), max_size=3),
    version=st.sampled_from(["1", "", "x"]),
)
def test_any_inference_message_is_decoded_or_rejected(
    shape: list[int], datatype: str, raw: list[bytes], version: str
) -> None:
    message = service_pb2.ModelInferResponse(model_version=version, raw_output_contents=raw)
    for name in OUTPUTS:
        message.outputs.add(name=name, datatype=datatype, shape=shape)
    try:
        answer = call().read_message(message.SerializeToString())
    except InvalidResponse:
        return
    assert all(len(array) == 1 for array in answer.outputs.values())


@pytest.mark.slow
@given(
    responses=st.lists(
        JSON | st.dictionaries(st.sampled_from(["inputs", "parameters", "max_batch_size"]), JSON), min_size=9
    )
)
def test_a_request_sequence_ends_for_any_metadata_of_a_server(responses: list[Any]) -> None:
    for exchange in (
        RequestSequence("http://127.0.0.1:8000").predict([picture(1)], None, None),
        RequestSequence("http://127.0.0.1:8000").predict([picture(1)], [0.5, 0.5], None),
        RequestSequence("http://127.0.0.1:8000").class_names(),
        RequestSequence("http://127.0.0.1:8000").status(),
    ):
        remaining = iter([content if isinstance(content, dict) else {} for content in responses])
        with pytest.raises((ServingError, StopIteration)):
            calls = next(exchange)
            while True:
                content = next(remaining, {})
                answer = Answer({name: np.array([[content]], dtype=object) for name in (*OUTPUTS, "logits")}, 1)
                calls = exchange.send([answer if isinstance(sent, Infer) else content for sent in calls])


def test_a_request_is_encoded_once_with_model_and_version() -> None:
    request = image_call([picture(1), picture(2)], "strength", np.ones(1, np.float32), 7)
    assert request.http is request.http
    assert request.http.path == "/v2/models/classifier/versions/7/infer"
    sent = service_pb2.ModelInferRequest.FromString(request.message)
    assert (sent.model_name, sent.model_version) == ("classifier", "7")
    assert [(tensor.name, list(tensor.shape)) for tensor in sent.inputs] == [("image", [2, 1]), ("strength", [2, 1])]
    assert picture(2) in request.http.body and picture(2) in sent.raw_input_contents[0]


def test_a_broken_tcp_connection_is_retried_and_no_tls_error() -> None:
    """gRPC's message on a busy machine: its "tcp handshaker" is not TLS."""
    import grpc

    from serving.transport.failures import Unavailable, grpc_error

    class Broken:
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.UNAVAILABLE

        def details(self) -> str:
            return "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:9: tcp handshaker shutdown"

    assert isinstance(grpc_error("grpc://127.0.0.1:9", Broken(), 1.0), Unavailable)
