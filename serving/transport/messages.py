"""Encode requests to Triton as HTTP requests and gRPC messages, and decode their responses (sans I/O).

The encoded forms are bytes, so that the synchronous and the asynchronous transport send identical requests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import quote

import numpy as np
from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

from serving.shared.terminal import counted

HEADER_LENGTH = "inference-header-content-length"
SERVICE = "/inference.GRPCInferenceService/"


class InvalidResponse(Exception):
    """A response of status 200 that cannot be decoded as Triton's."""


@dataclass(frozen=True)
class HttpRequest:
    """One HTTP request, without the headers that belong to the connection."""

    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None


@dataclass(frozen=True)
class Answer:
    """The outputs of an inference by name (object arrays of bytes for strings), and the model version."""

    outputs: dict[str, np.ndarray]
    version: int


class _Metadata:
    """A request whose response is decoded to a dict: JSON over HTTP, a protobuf message over gRPC."""

    rpc, path = "", ""
    fields: Mapping[str, str] = {}

    @property
    def http(self) -> HttpRequest:
        return HttpRequest("GET", self.path)

    @property
    def message(self) -> bytes:
        encoded: bytes = getattr(_messages(), f"{self.rpc}Request")(**self.fields).SerializeToString()
        return encoded

    def read_http(self, _headers: Mapping[str, str], body: bytes) -> dict[str, Any]:
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            raise InvalidResponse from None
        if not isinstance(content, dict):
            raise InvalidResponse
        return content

    def read_message(self, data: bytes) -> dict[str, Any]:
        from google.protobuf.json_format import MessageToDict

        return MessageToDict(_parse_message(self.rpc, data), preserving_proto_field_name=True)


class ServerMetadata(_Metadata):
    """Request for the server's name and version."""

    rpc, path = "ServerMetadata", "/v2"


class ModelMetadata(_Metadata):
    """Request for a model's versions, inputs and outputs; shapes have -1 for the batch dimension."""

    rpc = "ModelMetadata"

    def __init__(self, model: str) -> None:
        self.path, self.fields = _model_path(model), {"name": model}


class ModelConfig(_Metadata):
    """Request for a model's configuration (config.pbtxt) as a dict."""

    rpc = "ModelConfig"

    def __init__(self, model: str) -> None:
        self.path, self.fields = f"{_model_path(model)}/config", {"name": model}

    def read_message(self, data: bytes) -> dict[str, Any]:
        return super().read_message(data).get("config", {})


@dataclass(frozen=True, eq=False)
class Infer:
    """An inference request; the response is an Answer.

    inputs: arrays by name, batch dimension first; object arrays of bytes for strings. outputs: name to 0 for the plain
    tensor, or to n for Triton's classification extension, n strings "value:index:label" per row. version: "" is the
    newest. optional: names of further plain outputs, which the response may lack.
    """

    model: str
    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, int]
    version: str = ""
    optional: Sequence[str] = ()
    rpc = "ModelInfer"

    @cached_property
    def http(self) -> HttpRequest:
        """The HTTP request; cached, so that a retry sends the same bytes."""
        import tritonclient.http as api

        tensors = []
        for name, array in self.inputs.items():
            tensor = api.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
            tensors.append(tensor.set_data_from_numpy(array))
        outputs = [api.InferRequestedOutput(name, class_count=count) for name, count in self._requested.items()]
        body, json_length = api.InferenceServerClient.generate_request_body(tensors, outputs=outputs)
        headers = {"content-type": "application/octet-stream"}
        if json_length is not None:
            headers[HEADER_LENGTH] = str(json_length)
        return HttpRequest("POST", f"{_model_path(self.model, self.version)}/infer", headers, body)

    @cached_property
    def message(self) -> bytes:
        """The gRPC message; cached, so that a retry sends the same bytes."""
        request = _messages().ModelInferRequest(model_name=self.model, model_version=self.version)
        for name, array in self.inputs.items():
            request.inputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
            strings = array.dtype == np.object_
            request.raw_input_contents.append(serialize_byte_tensor(array).item() if strings else array.tobytes())
        for name, count in self._requested.items():
            output = request.outputs.add(name=name)
            if count:
                output.parameters["classification"].int64_param = count
        return request.SerializeToString()

    @property
    def _requested(self) -> dict[str, int]:
        return dict(self.outputs) | dict.fromkeys(self.optional, 0)

    def read_http(self, headers: Mapping[str, str], body: bytes) -> Answer:
        import tritonclient.http as api

        try:
            length = headers.get(HEADER_LENGTH)
            result = api.InferenceServerClient.parse_response_body(body, header_length=length and int(length))
            return self._answer(result, result.get_response()["model_version"])
        except InvalidResponse:
            raise
        except Exception as error:
            # tritonclient parses without validation: invalid bytes can raise any exception.
            raise InvalidResponse from error

    def read_message(self, data: bytes) -> Answer:
        import tritonclient.grpc as api

        message = _parse_message(self.rpc, data)
        try:
            return self._answer(api.InferResult(message), message.model_version)
        except InvalidResponse:
            raise
        except Exception as error:
            raise InvalidResponse from error

    def _answer(self, result: Any, version: str) -> Answer:
        outputs = {name: result.as_numpy(name) for name in self.outputs}
        more = {name: result.as_numpy(name) for name in self.optional}
        outputs |= {name: array for name, array in more.items() if array is not None}
        rows = len(next(iter(self.inputs.values())))
        for name, array in outputs.items():
            if array is None or array.ndim < 2 or len(array) != rows:
                raise InvalidResponse(f"{self.model} returned no output {name} with {counted(rows, 'row')}")
        return Answer(outputs, int(version))


# A request to Triton. `rpc`: method of Triton's gRPC service. `http`, `message`: the encoded request.
# read_http(headers, body) and read_message(data) decode the response, or raise InvalidResponse.
Call = ServerMetadata | ModelMetadata | ModelConfig | Infer


def _model_path(model: str, version: str = "") -> str:
    path = f"/v2/models/{quote(model, safe='')}"
    return f"{path}/versions/{quote(version, safe='')}" if version else path


def _parse_message(rpc: str, data: bytes) -> Any:
    """Parse the response message of an RPC method. Raises InvalidResponse."""
    from google.protobuf.message import DecodeError

    try:
        return getattr(_messages(), f"{rpc}Response").FromString(data)
    except DecodeError:
        raise InvalidResponse from None


def _messages() -> Any:
    from tritonclient.grpc import service_pb2

    return service_pb2
