"""Generator of requests that are invalid HTTP, JSON or protobuf, or that are not allowed for callers."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from conftest import SIZE, picture
from tritonclient.grpc import service_pb2

from tests.support.bad_images import data_url, solid_webp
from tests.support.bad_requests import INFER, TensorRequest, good_body, good_inputs, over_grpc, with_length


@dataclass(frozen=True)
class HttpRequest:
    """A request that is invalid HTTP or requests something that does not exist. `statuses`: allowed responses."""

    fault: str
    culprit: str
    path: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    method: str = "POST"
    statuses: tuple[int, ...] = (400,)


def typed_over_grpc(draw: random.Random) -> service_pb2.ModelInferRequest:
    """A request with typed contents instead of raw bytes, and an image whose shape exceeds memory."""
    message = service_pb2.ModelInferRequest(model_name=draw.choice(["classifier", "student"]))
    shape = draw.choice([[2**31, 1], [2**45, 3, SIZE, SIZE], [2**62, 1], [2**32, 2**32, 2**32]])
    image = message.inputs.add(name="image", shape=shape)
    if message.model_name == "classifier":
        image.datatype = "BYTES"
        image.contents.bytes_contents.append(picture(1))
    else:
        image.datatype = "UINT8"
        image.contents.uint_contents.extend(range(192))
    message.inputs.add(name="strength", datatype="FP32", shape=[1, 1]).contents.fp32_contents.append(0.5)
    return message


def encode_varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def protobuf_field(tag: int, data: bytes) -> bytes:
    """Encode a protobuf field of bytes. tag: 8 times the field number, plus 2."""
    return encode_varint(tag) + encode_varint(len(data)) + data


def message_bytes(draw: random.Random) -> tuple[str, bytes]:
    """A name and a message that protobuf parses differently from a careless parser, or with a forbidden request."""
    model = draw.choice(["classifier", "student"])
    good = over_grpc(TensorRequest("", "", model, good_inputs(model, 1)))
    message = good.SerializeToString()
    tag, extra = draw.choice([1, 2, 8, 64]) << 32, good.inputs[0].SerializeToString()
    output = {"classifier": "class", "student": "feature"}[model]
    classified = type(good)()
    classified.outputs.add(name=output).parameters["classification"].int64_param = draw.choice([1, -1, 2**40])
    region = type(good)()
    region.outputs.add(name=output).parameters["shared_memory_region"].string_param = "x"
    shared = type(good)()
    shared.inputs.add(name="prior").parameters["shared_memory_region"].string_param = "x"
    priority = type(good)()
    priority.parameters["priority"].uint64_param = 1
    typed = type(good)()
    typed.inputs.add(name="strength", datatype="FP32", shape=[1, 1]).contents.fp32_contents.append(0.5)
    return draw.choice(
        [
            ("tag above 2^32", message + protobuf_field(tag + (5 << 3 | 2), extra)),
            ("unknown field", message + protobuf_field(99 << 3 | 2, b"x")),
            ("field number 0", message + protobuf_field(2, b"x")),
            ("classification", message + classified.SerializeToString()),
            ("shared memory of an output", message + region.SerializeToString()),
            ("shared memory of an input", message + shared.SerializeToString()),
            ("priority", message + priority.SerializeToString()),
            ("typed beside raw", typed.SerializeToString() + message),
            ("model twice", message + protobuf_field(1 << 3 | 2, b"student")),
            ("other model", protobuf_field(1 << 3 | 2, b"nothing") + message.partition(model.encode())[2]),
            ("group", message + bytes([5 << 3 | 3, 5 << 3 | 4])),
            ("fixed", message + bytes([5 << 3 | 5]) + b"abcd"),
            ("cut", message[: draw.randrange(1, len(message))]),
            ("many fields", message + protobuf_field(6 << 3 | 2, b"") * 20_000),
            (
                "many fields in fields",
                message + protobuf_field(4 << 3 | 2, protobuf_field(1 << 3 | 2, b"") * 500) * 500,
            ),
            ("endless number", message + bytes([5 << 3 | 2]) + b"\xff" * 12),
        ]
    )


def not_json(draw: random.Random) -> HttpRequest:
    body = draw.choice(
        [
            b"{",
            b"[]",
            b"null",
            b'{"inputs":',
            b"\xff\xfe",
            b'{"inputs":[{}]}',
            b'{"inputs":{}}',
            b'{"inputs":[]}',
            b"[" * 9000,
        ]
    )
    return HttpRequest("json: invalid", "", INFER, body, with_length(body))


def json_tensors(draw: random.Random) -> HttpRequest:
    """Inconsistent tensors as JSON; some of them crash Triton 24.10."""
    entry: dict[str, object] = {"name": "strength", "datatype": "FP32", "shape": [1, 1], "data": [0.5]}
    empty = {"name": "strength", "datatype": "FP32", "shape": [2**45, 1]}
    image = {"name": "image", "datatype": "BYTES", "shape": [1, 1]}
    region = {"shared_memory_region": "x", "binary_data_size": 0}
    fault, entry, culprit = draw.choice(
        [
            ("json: no image", entry, "image"),
            ("json: shape beyond memory", entry | {"shape": [2**45, 1]}, "strength"),
            ("json: shape beyond memory", empty, "strength"),
            ("json: shape beyond data", entry | {"shape": [2**20, 1]}, "strength"),
            ("json: shape", entry | {"shape": "wide"}, "strength"),
            (
                "json: value",
                entry | {"data": draw.choice([["0.5"], [None], [True], [{"a": 1}], [[[[[[[[1]]]]]]]]])},
                "",
            ),
            ("json: value", image | {"data": [0]}, "image"),
            (
                "json: image as text",
                image
                | {"data": [draw.choice(["cat.png", "data:image/png;base64,", data_url(solid_webp(7000)).decode()])]},
                "image",
            ),
            ("json: more values", entry | {"data": [0.5] * draw.randint(2, 50_000)}, "strength"),
            ("json: both forms", entry | {"parameters": {"binary_data_size": 4}}, "strength"),
            ("json: unknown key", entry | {"d\u0061t\\u0061": 1}, "strength"),
            ("json: shared memory", image | {"parameters": region}, "shared_memory_region"),
        ]
    )
    body = json.dumps({"inputs": [entry]}).encode()
    return HttpRequest(fault, culprit, INFER, body, with_length(body) if draw.random() < 0.5 else {})


def duplicate_json_key(draw: random.Random) -> HttpRequest:
    """A duplicate JSON key: cjson keeps the last value and RapidJSON the first."""
    body, headers = good_body()
    length = int(headers["Inference-Header-Content-Length"])
    key, hidden = draw.choice(
        [
            ('"datatype": "BYTES"', '"datatype": "UINT8"'),
            ('"shape": [1, 1]', '"shape": [4294967297, 1]'),
            ('"name": "image"', '"name": "prior"'),
            ('"parameters": {"binary_data_size"', '"parameters": {"shared_memory_region": "x"}'),
            ('"inputs": [', '"parameters": {"priority": 1}, "parameters": {}'),
            ('"inputs": [', '"outputs": [{"name": "class", "parameters": {"classification": 1}}], "outputs": []'),
            ('"inputs": [', '"id": "a", "\\u0069d": "b"'),
        ]
    )
    head = body[:length].decode().replace(key, f"{hidden}, {key}", 1).encode()
    return HttpRequest("json: key twice", "twice", INFER, head + body[length:], with_length(head))


def bad_output_parameters(draw: random.Random) -> HttpRequest:
    """Outputs with a parameter that crashes Triton 24.10 or is not allowed for callers."""
    body, headers = good_body()
    length = int(headers["Inference-Header-Content-Length"])
    parameters, culprit = draw.choice(
        [
            ({"classification": 1}, "classification"),
            ({"classification": -1}, "classification"),
            ({"shared_memory_region": "x", "shared_memory_byte_size": 8}, "shared_memory"),
            ({"binary_data": 1}, "binary_data"),
        ]
    )
    name = draw.choice(["class", "probability", "index"])
    head = json.dumps(json.loads(body[:length]) | {"outputs": [{"name": name, "parameters": parameters}]}).encode()
    return HttpRequest(f"output: {culprit}", culprit, INFER, head + body[length:], with_length(head))


def nested_json(draw: random.Random) -> HttpRequest:
    depth = draw.choice([20, 5000, 300_000, 600_000])
    body = b'{"inputs":[{"name":"image","shape":[1,1],"datatype":"BYTES","data":' + b"[" * depth + b"]" * depth + b"}]}"
    return HttpRequest("json: nested", "JSON", INFER, body, with_length(body) if draw.random() < 0.5 else {})


def many_keys(draw: random.Random) -> HttpRequest:
    body = b'{"inputs":[' + b",".join(b'{"a":"b"}' for _ in range(draw.choice([9, 20_000]))) + b"]}"
    return HttpRequest("json: many keys", "", INFER, body)


def bad_json_part(draw: random.Random) -> HttpRequest:
    body, _ = good_body()
    length = draw.choice(["-1", "0", "x", "9999", "99999", "99999999999999999999", "1e3", "0x10", "5 5", "3"])
    headers = {"Inference-Header-Content-Length": length}
    culprit = "JSON" if length == "3" else "Inference-Header-Content-Length"
    return HttpRequest("json: length of its part", culprit, INFER, body, headers)


def encoded_body(draw: random.Random) -> HttpRequest:
    coding = draw.choice(["gzip", "deflate", "br", "gzip, gzip", "x"])
    body = gzip.compress(bytes(draw.choice([1000, 30_000_000])), 1, mtime=0)
    return HttpRequest("body: encoded", "compressed", INFER, body, {"Content-Encoding": coding}, statuses=(415,))


def large_body(draw: random.Random) -> HttpRequest:
    _, headers = good_body()
    body = bytes(draw.choice([50, 64]) * 1024 * 1024)
    return HttpRequest("body: 50 MiB and more", "too large", INFER, body, headers, statuses=(413,))


def bad_path(draw: random.Random) -> HttpRequest:
    method, path, status = draw.choice(
        [
            ("GET", INFER, 405),
            ("PUT", INFER, 405),
            ("DELETE", "/v2/models/classifier", 405),
            ("POST", "/v2/health/ready", 405),
            ("POST", "/v2/models/nothing/infer", 404),
            ("POST", "/v2/repository/index", 404),
            ("POST", "/v2/repository/models/student/unload", 404),
            ("GET", "/v2/models/classifier/stats", 404),
            ("GET", "/v2/systemsharedmemory/status", 404),
            ("POST", "/v2/trace/setting", 404),
            ("POST", "/v2/logging", 404),
            ("GET", "/metrics", 404),
            ("GET", "/_error/404", 404),
            ("GET", "/v2/models/%2e%2e/%2e%2e/repository/index", 404),
            ("GET", "/" + "a" * 4000, 404),
            ("GET", "/" + "a" * 40_000, 414),
            ("POST", "/v2/models/classifier/versions/99999999999/infer", 404),
            ("GET", "/v2%0A", 404),
            ("GET", "/v2/health/ready%0A", 404),
            ("GET", "/v2/models/classifier/config%0A", 404),
            ("POST", f"{INFER}%0A", 404),
        ]
    )
    return HttpRequest(f"path: {status}", "", path, b"", method=method, statuses=(status,))


def large_headers(draw: random.Random) -> HttpRequest:
    headers = {"X-Long": "a" * draw.choice([9000, 30_000, 60_000])}
    return HttpRequest("headers: too large", "headers", INFER, b"", headers, statuses=(400, 494))


HTTP_FAULTS: list[Callable[[random.Random], HttpRequest]] = [
    not_json,
    json_tensors,
    json_tensors,
    duplicate_json_key,
    bad_output_parameters,
    nested_json,
    many_keys,
    bad_json_part,
    encoded_body,
    bad_path,
    bad_path,
    large_headers,
]
