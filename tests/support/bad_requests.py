"""Generator of invalid requests: from a seed, any number of requests to which no server should respond with 200.

Each is a valid request with one fault, in its tensors (sent over HTTP in binary form, as JSON, or over gRPC) or in the
protocol. `culprit`: text that the error message should contain; empty where the request has no inputs.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
from conftest import CLASSES, MAX_BATCH_SIZE, SIZE, picture
from PIL import Image
from tritonclient.grpc import service_pb2

SIZES = {"UINT8": np.uint8, "FP32": np.float32, "INT64": np.int64, "FP64": np.float64, "BOOL": np.bool_}


@dataclass(frozen=True)
class Tensor:
    """An input tensor as transmitted: `raw` may contradict dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    raw: bytes


@dataclass(frozen=True)
class TensorRequest:
    """An inference request and its fault."""

    fault: str
    culprit: str
    model: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[str, ...] = ()
    version: str = ""


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


def strings(*values: bytes) -> bytes:
    """Encode BYTES elements in Triton's binary form."""
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


def floats(*values: float) -> bytes:
    return np.array(values, dtype=np.float32).tobytes()


def classifier(images: list[bytes], **inputs: Tensor) -> tuple[Tensor, ...]:
    given = {"image": Tensor("image", "BYTES", (len(images), 1), strings(*images))} | inputs
    return tuple(given.values())


def strength(*values: float) -> Tensor:
    return Tensor("strength", "FP32", (len(values), 1), floats(*values))


def target_prior(*values: float) -> Tensor:
    return Tensor("target_prior", "FP32", (1, len(values)), floats(*values))


def good_inputs(model: str, seed: int) -> tuple[Tensor, ...]:
    """Return the inputs of a valid request with one row."""
    if model == "classifier":
        return classifier([picture(seed)], strength=strength(0.5))
    pixels = np.random.default_rng(seed).integers(0, 256, 3 * SIZE * SIZE, dtype=np.uint8)
    return Tensor("image", "UINT8", (1, 3, SIZE, SIZE), pixels.tobytes()), strength(0.5)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def solid_webp(side: int) -> bytes:
    """Return a lossless WebP of side x side pixels in one colour: 36 bytes."""
    one = saved(Image.new("RGB", (1, 1), "red"), "WEBP", lossless=True)
    sizes = int.from_bytes(one[21:25], "little") & ~(2**28 - 1) | (side - 1) | (side - 1) << 14
    return one[:21] + sizes.to_bytes(4, "little") + one[25:]


def shared_exif() -> bytes:
    """Return EXIF with 999 tags that share the same 50 kB value, which Pillow would copy for each tag."""
    entries = b"".join(struct.pack(">HHII", 1000 + tag, 1, 50_000, 14 + 12 * 999) for tag in range(999))
    return b"MM\0*\0\0\0\x08" + struct.pack(">H", 999) + entries + bytes(4 + 50_000)


@cache
def hostile_images() -> dict[str, bytes]:
    """Return image files that a server must reject before decoding, by fault."""
    red = Image.new("RGB", (16, 16), "red")
    png, jpeg = saved(red, "PNG"), saved(red, "JPEG")
    progressive = saved(Image.new("L", (64, 64), 100), "JPEG", progressive=True)
    last_scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    return {
        "empty": b"",
        "text": b"a letter",
        "zeros": bytes(1000),
        "gif": saved(red, "GIF"),
        "bmp": saved(red, "BMP"),
        "tiff": saved(red, "TIFF"),
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "zip": b"PK\3\4" + png,
        "gif before png": b"GIF89a" + png,
        "script before jpeg": b"#!/bin/sh\n" + jpeg,
        "cut png": png[: len(png) // 2],
        "cut jpeg": saved(Image.effect_noise((64, 64), 90), "JPEG")[:700],
        "bomb by header": png[:8] + header + png[33:],
        "thread": saved(Image.new("RGB", (1000, 1)), "PNG"),
        "canvas": b"RIFF\x64\0\0\0WEBPVP8X\n\0\0\0\x10\0\0\0\xfe\x3f\0\xfe\x3f\0" + bytes(70),
        "many scans": progressive[:-2] + last_scan * 200 + progressive[-2:],
        "many segments": jpeg[:2] + b"\xff\xfe\0\2" * 30_000 + jpeg[2:],
        "many chunks": png[:33] + chunk(b"prVt", b"") * 30_000 + png[33:],
        "49 megapixels in 36 bytes": solid_webp(7000),
        "16 megapixels and one more row": saved(Image.new("1", (4000, 4001)), "PNG"),
        "many profiles": png[:33] + chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(1_000_000))) * 500 + png[33:],
        "many compressed texts": png[:33] + chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(1_000_000))) * 60 + png[33:],
        "many exif tags": png[:33] + chunk(b"eXIf", b"II*\0\x08\0\0\0\xff\xff" + bytes(786_424)) + png[33:],
        "exif tags that share their values": png[:33] + chunk(b"eXIf", shared_exif()) + png[33:],
        "many exif segments": jpeg[:2] + (b"\xff\xe1\xf0\x02Exif\0\0" + bytes(61_434)) * 200 + jpeg[2:],
        "many photoshop blocks": jpeg[:2]
        + (b"\xff\xed\xef\xf8Photoshop 3.0\0" + b"8BIM\0\1\0\0\0\0\0\0" * 5118) * 9
        + jpeg[2:],
        "wrong checksum": png[:40] + bytes([png[40] ^ 255]) + png[41:],
        "no pixels": png[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 0, 8, 2, 0, 0, 0)) + png[33:],
        "above the bytes of an image": jpeg + bytes(33 * 1024 * 1024),
    }


def data_url(image: bytes) -> bytes:
    """Encode an image as a data URL, as in a JSON request."""
    return b"data:image/png;base64," + base64.b64encode(image)


def bad_text_image(draw: random.Random) -> TensorRequest:
    """Images as base64 text: invalid base64, a data URL in a data URL, or a hostile file, limited like its bytes."""
    text, hostile = data_url(picture(1)), hostile_images()
    broken = {
        "space": text[:60] + b" " + text[60:],
        "padding inside": text[:60] + b"====" + text[60:],
        "no padding": data_url(b"ab").rstrip(b"="),
        "url alphabet": text[:60] + b"-_-_" + text[60:],
        "nothing": data_url(b""),
        "text in a text": data_url(text),
        "above the bytes": text[:22] + b"A" * (45 * 1024 * 1024),
    }
    if draw.random() < 0.3:
        fault = draw.choice([name for name in broken if name != "above the bytes" or draw.random() < 0.1])
        image = broken[fault]
    else:
        fault = draw.choice([name for name, data in hostile.items() if len(data) < 1024 * 1024])
        image = data_url(hostile[fault])
    return TensorRequest(f"image as text: {fault}", "image", "classifier", classifier([image]))


def many_pixels(draw: random.Random) -> TensorRequest:
    """Images that are each within the limit, but together exceed the pixels of a request."""
    images = [draw.choice([solid_webp(4000), saved(Image.new("1", (4000, 4000)), "PNG")]) for _ in range(2)]
    if draw.random() < 0.5:
        images = [data_url(image) for image in images]
    return TensorRequest("image: 32 megapixels in two", "25000000", "classifier", classifier(images))


def bad_image(draw: random.Random) -> TensorRequest:
    names = [name for name in hostile_images() if name != "above the bytes of an image" or draw.random() < 0.05]
    fault = draw.choice(names)
    images = [hostile_images()[fault]]
    if draw.random() < 0.3:
        images.insert(draw.randint(0, 1), picture(draw.randrange(50)))
    strengths = strength(*[draw.random() for _ in images])
    return TensorRequest(f"image: {fault}", "image", "classifier", classifier(images, strength=strengths))


def damaged_image(draw: random.Random) -> TensorRequest:
    data = bytearray(picture(draw.randrange(50)))
    # Cut in the first half: a cut further back may leave all pixels intact.
    del data[draw.randrange(9, len(data) // 2) :]
    return TensorRequest("image: cut anywhere", "image", "classifier", classifier([bytes(data)]))


def many_images(draw: random.Random) -> TensorRequest:
    """Thousands of files with many segments, whose headers take seconds to read."""
    jpeg = saved(Image.new("RGB", (16, 16), "red"), "JPEG")
    images = [jpeg[:2] + b"\xff\xfe\0\2" * draw.choice([10, 200]) + jpeg[2:]] * draw.choice([MAX_BATCH_SIZE + 1, 4096])
    return TensorRequest("image: many of many parts", "batch-size", "classifier", classifier(images))


def bad_strength(draw: random.Random) -> TensorRequest:
    value = draw.choice([np.nan, np.inf, -np.inf])
    model = draw.choice(["classifier", "student"])
    inputs = [strength(value) if tensor.name == "strength" else tensor for tensor in good_inputs(model, 1)]
    return TensorRequest("strength: not finite", "strength", model, tuple(inputs))


def bad_prior(draw: random.Random) -> TensorRequest:
    fault, values = draw.choice(
        [
            ("negative", [-draw.random(), 1, 0.5, 0.5, 0]),
            ("sum", [draw.uniform(0, 0.19)] * len(CLASSES)),
            ("zero", [0] * len(CLASSES)),
            ("nan", [np.nan, 1, 0, 0, 0]),
            ("inf", [np.inf, 1, 0, 0, 0]),
            ("huge", [3e38] * len(CLASSES)),
            ("short", [0.5, 0.5]),
            ("long", [0.1] * 10),
            ("none", []),
        ]
    )
    prior = target_prior(*values)
    return TensorRequest(f"prior: {fault}", "target_prior", "classifier", classifier([picture(1)], target_prior=prior))


def bad_prior_text(draw: random.Random) -> TensorRequest:
    """Invalid values of the input `prior`: not a name, not a number, not a list of five numbers that sum to 1."""
    fault, text = draw.choice(
        [
            ("empty", b""),
            ("no name", draw.choice([b"trian", b"Balanced", b"\0", b"\xff\xfe" * draw.randrange(1, 100)])),
            ("no number", draw.choice([b"nan", b"-inf", b"1e39", b"0x1", b"1,5", b"9" * draw.randrange(100, 100_000)])),
            ("short", b"[0.5, 0.5]"),
            ("sum", b"[0.1, 0.1, 0.1, 0.1, 0.1]"),
            ("negative", b"[2, -1, 0, 0, 0]"),
            ("nan", b"[NaN, 1, 0, 0, 0]"),
            ("huge", b"[1e308, 1e308, 0, 0, 0]"),
            ("nested", b"[[0.2, 0.2, 0.2, 0.2, 0.2]]"),
            ("deep", b"[" * draw.choice([50, 380, 100_000])),
            ("cut", b"[0.2, 0.2, 0.2"),
            ("underscore", draw.choice([b"1_0", b"[0_1, 1, 0, 0, 0]"])),
            ("other digits", "\u0661".encode()),
            ("text in a list", b'["1", 0, 0, 0, 0]'),
            ("boolean in a list", b"[true, 0, 0, 0, 0]"),
            ("null in a list", b"[1, null, 0, 0, 0]"),
            ("no list", b'[{"ant": 1}, 0, 0, 0, 0]'),
            ("integer", b"[1" + b"0" * 360 + b"]"),
        ]
    )
    prior = Tensor("prior", "BYTES", (1, 1), strings(text))
    return TensorRequest(f"prior as text: {fault}", "prior", "classifier", classifier([picture(1)], prior=prior))


def both_priors(draw: random.Random) -> TensorRequest:
    inputs = classifier([picture(1)], strength=strength(draw.random()), target_prior=target_prior(*[0.2] * 5))
    return TensorRequest("prior: two", "target_prior", "classifier", inputs)


def bad_tensor(draw: random.Random) -> TensorRequest:
    """A valid request in which one input has a wrong dtype, shape, name or size, is missing, or occurs twice."""
    model = draw.choice(["classifier", "student"])
    inputs = list(good_inputs(model, draw.randrange(50)))
    place = draw.randrange(len(inputs))
    good = inputs[place]
    fault = draw.choice(
        ["dtype", "rank", "dimension", "negative", "huge", "name", "missing", "twice", "short", "long", "lie"]
    )
    if fault == "dtype":
        inputs[place] = replace(good, dtype=draw.choice(sorted({*SIZES, "BYTES", "FP128", ""} - {good.dtype})))
    elif fault == "rank":
        inputs[place] = replace(good, shape=draw.choice([(), (1,), (*good.shape, 1), (1, *good.shape), (1,) * 40]))
    elif fault == "dimension":
        inputs[place] = replace(good, shape=(*good.shape[:-1], good.shape[-1] + draw.randint(1, 9)))
    elif fault == "negative":
        inputs[place] = replace(good, shape=(good.shape[0], *good.shape[1:-1], -draw.randint(1, 2**40)))
    elif fault == "huge":
        # Triton counts rows modulo 2**32, so some huge row counts of a tensor after the first pass as correct.
        huge = [2**31, 2**31 + 1, MAX_BATCH_SIZE + 1] + [2**40, 2**62] * (place == 0)
        inputs[place] = replace(good, shape=(draw.choice(huge), *good.shape[1:]))
    elif fault == "name":
        inputs[place] = replace(good, name=draw.choice(["", "x", "Image", "image ", "\u0000", "ä" * 500]))
    elif fault == "missing":
        # Without strength the default applies, so the classifier's image is dropped.
        place = 0 if model == "classifier" else place
        good = inputs.pop(place)
    elif fault == "twice":
        inputs.insert(place, good)
    elif fault == "short":
        inputs[place] = replace(good, raw=good.raw[:-1])
    elif fault == "long":
        inputs[place] = replace(good, raw=good.raw + b"\0")
    else:
        place, good = 0, inputs[0]
        inputs[0] = replace(good, raw=struct.pack("<I", 2**31) + good.raw[4:-1])
    # For a row count that is too large Triton may name the other input.
    culprit = {"name": "", "huge": "input"}.get(fault, good.name)
    return TensorRequest(f"tensor: {fault}", culprit, model, tuple(inputs))


def bad_target(draw: random.Random) -> TensorRequest:
    fault, model, version, outputs = draw.choice(
        [
            ("version 9", "classifier", "9", ()),
            ("version 0", "classifier", "0", ()),
            ("output", "classifier", "", ("nothing",)),
            ("output of the other model", "student", "", ("probability",)),
        ]
    )
    return TensorRequest(f"asked: {fault}", "", model, good_inputs(model, 1), outputs, version)


TENSOR_FAULTS = [
    bad_image,
    bad_image,
    bad_text_image,
    many_pixels,
    damaged_image,
    many_images,
    bad_strength,
    bad_prior,
    bad_prior_text,
    both_priors,
    bad_tensor,
    bad_tensor,
    bad_target,
]
INFER = "/v2/models/classifier/infer"


def json_part(fault: TensorRequest) -> dict[str, object]:
    """Return the JSON header of a request in binary form."""
    inputs = [
        {
            "name": tensor.name,
            "shape": list(tensor.shape),
            "datatype": tensor.dtype,
            "parameters": {"binary_data_size": len(tensor.raw)},
        }
        for tensor in fault.inputs
    ]
    return {"inputs": inputs} | ({"outputs": [{"name": name} for name in fault.outputs]} if fault.outputs else {})


def path_of(fault: TensorRequest) -> str:
    return f"/v2/models/{fault.model}{f'/versions/{fault.version}' if fault.version else ''}/infer"


def over_http(fault: TensorRequest) -> tuple[str, bytes, dict[str, str]]:
    """Return path, body and headers of a tensor request in Triton's binary form."""
    head = json.dumps(json_part(fault), ensure_ascii=False).encode()
    body = head + b"".join(tensor.raw for tensor in fault.inputs)
    return path_of(fault), body, {"Inference-Header-Content-Length": str(len(head))}


def over_grpc(fault: TensorRequest) -> service_pb2.ModelInferRequest:
    message = service_pb2.ModelInferRequest(model_name=fault.model, model_version=fault.version)
    for tensor in fault.inputs:
        message.inputs.add(name=tensor.name, datatype=tensor.dtype, shape=tensor.shape)
        message.raw_input_contents.append(tensor.raw)
    for name in fault.outputs:
        message.outputs.add(name=name)
    return message


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


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def protobuf_field(tag: int, data: bytes) -> bytes:
    """Encode a protobuf field of bytes. tag: 8 times the field number, plus 2."""
    return varint(tag) + varint(len(data)) + data


def message_bytes(draw: random.Random) -> tuple[str, bytes]:
    """A name and a message that protobuf parses differently from a careless parser, or with a forbidden request."""
    model = draw.choice(["classifier", "student"])
    good = over_grpc(TensorRequest("", "", model, good_inputs(model, 1)))
    plain = good.SerializeToString()
    tag, extra = draw.choice([1, 2, 8, 64]) << 32, good.inputs[0].SerializeToString()
    output = {"classifier": "class", "student": "feature"}[model]
    asking = type(good)()
    asking.outputs.add(name=output).parameters["classification"].int64_param = draw.choice([1, -1, 2**40])
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
            ("tag above 2^32", plain + protobuf_field(tag + (5 << 3 | 2), extra)),
            ("unknown field", plain + protobuf_field(99 << 3 | 2, b"x")),
            ("field number 0", plain + protobuf_field(2, b"x")),
            ("classification", plain + asking.SerializeToString()),
            ("shared memory of an output", plain + region.SerializeToString()),
            ("shared memory of an input", plain + shared.SerializeToString()),
            ("priority", plain + priority.SerializeToString()),
            ("typed beside raw", typed.SerializeToString() + plain),
            ("model twice", plain + protobuf_field(1 << 3 | 2, b"student")),
            ("other model", protobuf_field(1 << 3 | 2, b"nothing") + plain.partition(model.encode())[2]),
            ("group", plain + bytes([5 << 3 | 3, 5 << 3 | 4])),
            ("fixed", plain + bytes([5 << 3 | 5]) + b"abcd"),
            ("cut", plain[: draw.randrange(1, len(plain))]),
            ("many fields", plain + protobuf_field(6 << 3 | 2, b"") * 20_000),
            ("many fields in fields", plain + protobuf_field(4 << 3 | 2, protobuf_field(1 << 3 | 2, b"") * 500) * 500),
            ("endless number", plain + bytes([5 << 3 | 2]) + b"\xff" * 12),
        ]
    )


def good_body() -> tuple[bytes, dict[str, str]]:
    _, body, headers = over_http(TensorRequest("", "", "classifier", good_inputs("classifier", 1)))
    return body, headers


def with_length(body: bytes) -> dict[str, str]:
    return {"Inference-Header-Content-Length": str(len(body))}


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


def twice_in_json(draw: random.Random) -> HttpRequest:
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


def outputs_asked(draw: random.Random) -> HttpRequest:
    """Outputs with a parameter that crashes Triton 24.10 or is not allowed for callers."""
    body, headers = good_body()
    length = int(headers["Inference-Header-Content-Length"])
    wish, culprit = draw.choice(
        [
            ({"classification": 1}, "classification"),
            ({"classification": -1}, "classification"),
            ({"shared_memory_region": "x", "shared_memory_byte_size": 8}, "shared_memory"),
            ({"binary_data": 1}, "binary_data"),
        ]
    )
    name = draw.choice(["class", "probability", "index"])
    head = json.dumps(json.loads(body[:length]) | {"outputs": [{"name": name, "parameters": wish}]}).encode()
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


def elsewhere(draw: random.Random) -> HttpRequest:
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
    twice_in_json,
    outputs_asked,
    nested_json,
    many_keys,
    bad_json_part,
    encoded_body,
    elsewhere,
    elsewhere,
    large_headers,
]
