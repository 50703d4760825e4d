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

from serving.client.requests import OUTPUTS, RequestSequence, classifier_call
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
    return classifier_call([picture(1)], "strength", np.zeros(1, np.float32), None)


@pytest.mark.slow
@given(
    body=JSON | INFERENCE, tail=st.binary(max_size=60), length=st.none() | st.integers(-5, 400) | st.text(max_size=4)
)
def test_any_http_answer_is_read_or_refused(body: Any, tail: bytes, length: object) -> None:
    head = json.dumps(body).encode()
    for told in (str(len(head)), length):
        headers = {} if told is None else {HEADER_LENGTH: str(told)}
        try:
            answer = call().read_http(headers, head + tail)
        except InvalidResponse:
            continue
        assert isinstance(answer, Answer)
        assert set(answer.outputs) == set(OUTPUTS)


@given(data=st.binary(max_size=200))
def test_any_grpc_answer_is_read_or_refused(data: bytes) -> None:
    for question in (call(), ModelConfig("m"), ModelMetadata("m"), ServerMetadata()):
        try:
            question.read_message(data)
        except InvalidResponse:
            continue


@given(
    shape=st.lists(st.integers(-3, 9), max_size=3),
    datatype=st.sampled_from(["BYTES", "FP32", "INT32", "?"]),
    raw=st.lists(st.binary(max_size=40), max_size=3),
    version=st.sampled_from(["1", "", "x"]),
)
def test_any_inference_message_is_read_or_refused(
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
    told=st.lists(JSON | st.dictionaries(st.sampled_from(["inputs", "parameters", "max_batch_size"]), JSON), min_size=9)
)
def test_whatever_a_server_tells_of_itself_a_dialogue_ends_in_words(told: list[Any]) -> None:
    dialogues = [
        lambda of: of.predict([picture(1)], None, None),
        lambda of: of.predict([picture(1)], [0.5, 0.5], None),
        lambda of: of.class_names(),
        lambda of: of.status(),
    ]
    for begin in dialogues:
        answers = iter([content if isinstance(content, dict) else {} for content in told])
        steps = begin(RequestSequence("http://127.0.0.1:8000"))
        with pytest.raises((ServingError, StopIteration)):
            calls = next(steps)
            while True:
                told_now = next(answers, {})
                wrong = Answer({name: np.array([[told_now]], dtype=object) for name in (*OUTPUTS, "logits")}, 1)
                calls = steps.send([wrong if isinstance(asked, Infer) else told_now for asked in calls])


def test_a_request_is_made_once_and_carries_the_model_and_version() -> None:
    asked = classifier_call([picture(1), picture(2)], "strength", np.ones(1, np.float32), 7)
    assert asked.http is asked.http
    assert asked.http.path == "/v2/models/classifier/versions/7/infer"
    sent = service_pb2.ModelInferRequest.FromString(asked.message)
    assert (sent.model_name, sent.model_version) == ("classifier", "7")
    assert [(tensor.name, list(tensor.shape)) for tensor in sent.inputs] == [("image", [2, 1]), ("strength", [2, 1])]
    assert picture(2) in asked.http.body and picture(2) in sent.raw_input_contents[0]


def test_a_broken_tcp_connection_is_retried_and_no_fault_of_tls() -> None:
    """gRPC's message on a busy machine: its "tcp handshaker" is not TLS."""
    import grpc

    from serving.transport.failures import Unavailable, grpc_error

    class Broken:
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.UNAVAILABLE

        def details(self) -> str:
            return "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:9: tcp handshaker shutdown"

    assert isinstance(grpc_error("grpc://127.0.0.1:9", Broken(), 1.0), Unavailable)
