"""Generator of invalid inference requests: from a seed, any number of requests that a server must reject.

Each is a valid request with one fault in its tensors, sent over HTTP in binary form, or over gRPC. `culprit`: text that
the error message should contain; empty where the request has no inputs.
"""

from __future__ import annotations

import json
import random
import struct
from dataclasses import dataclass, replace

import numpy as np
from conftest import CLASSES, MAX_BATCH_SIZE, SIZE, picture
from PIL import Image
from tritonclient.grpc import service_pb2

from tests.support.bad_images import data_url, hostile_images, saved, solid_webp

INFER = "/v2/models/classifier/infer"
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


def strings(*values: bytes) -> bytes:
    """Encode BYTES elements in Triton's binary form."""
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


def floats(*values: float) -> bytes:
    return np.array(values, dtype=np.float32).tobytes()


def classifier(images: list[bytes], **inputs: Tensor) -> tuple[Tensor, ...]:
    tensors = {"image": Tensor("image", "BYTES", (len(images), 1), strings(*images))} | inputs
    return tuple(tensors.values())


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


def good_body() -> tuple[bytes, dict[str, str]]:
    _, body, headers = over_http(TensorRequest("", "", "classifier", good_inputs("classifier", 1)))
    return body, headers


def with_length(body: bytes) -> dict[str, str]:
    return {"Inference-Header-Content-Length": str(len(body))}


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
    index = draw.randrange(len(inputs))
    good = inputs[index]
    fault = draw.choice(
        ["dtype", "rank", "dimension", "negative", "huge", "name", "missing", "twice", "short", "long", "lie"]
    )
    if fault == "dtype":
        inputs[index] = replace(good, dtype=draw.choice(sorted({*SIZES, "BYTES", "FP128", ""} - {good.dtype})))
    elif fault == "rank":
        inputs[index] = replace(good, shape=draw.choice([(), (1,), (*good.shape, 1), (1, *good.shape), (1,) * 40]))
    elif fault == "dimension":
        inputs[index] = replace(good, shape=(*good.shape[:-1], good.shape[-1] + draw.randint(1, 9)))
    elif fault == "negative":
        inputs[index] = replace(good, shape=(good.shape[0], *good.shape[1:-1], -draw.randint(1, 2**40)))
    elif fault == "huge":
        # Triton counts rows modulo 2**32, so some huge row counts of a tensor after the first pass as correct.
        huge = [2**31, 2**31 + 1, MAX_BATCH_SIZE + 1] + [2**40, 2**62] * (index == 0)
        inputs[index] = replace(good, shape=(draw.choice(huge), *good.shape[1:]))
    elif fault == "name":
        inputs[index] = replace(good, name=draw.choice(["", "x", "Image", "image ", "\u0000", "ä" * 500]))
    elif fault == "missing":
        # Without strength the default applies, so the classifier's image is dropped.
        index = 0 if model == "classifier" else index
        good = inputs.pop(index)
    elif fault == "twice":
        inputs.insert(index, good)
    elif fault == "short":
        inputs[index] = replace(good, raw=good.raw[:-1])
    elif fault == "long":
        inputs[index] = replace(good, raw=good.raw + b"\0")
    else:
        index, good = 0, inputs[0]
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
    return TensorRequest(f"target: {fault}", "", model, good_inputs(model, 1), outputs, version)


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
