"""Parse a request to `classifier`: decode its images and check the prior of each row.

Runs in the inference process, with numpy. preprocess.py decodes the images; prior.py checks and computes priors.
"""

from __future__ import annotations

import binascii
import json
import math
import re
from collections import Counter
from typing import NamedTuple

import numpy as np
import triton_python_backend_utils as pb_utils

# Limits of decoded pixels per image and per request for a manifest without limits. An image of one colour with 16
# megapixels is a file of 34 bytes and takes 0.4 s to decode; a batch of them would delay all other requests.
IMAGE_PIXELS, REQUEST_PIXELS = 16_000_000, 25_000_000
# An image as text, for JSON, which has no bytes. No image file begins with these letters. The base64 must be canonical
# (no blanks, no line breaks, padding only at the end), because the gateway decodes the image's header from parts of the
# text (serving/gateway/lua/decoding.lua).
DATA_URL = re.compile(rb"data:image/(?:jpeg|png|webp);base64,")
NUMBER_BYTES = 64  # limit of a number in the text of a prior, with its separator
LARGEST = float(np.finfo(np.float32).max)  # limit of a strength as text: the input `strength` is float32
STRENGTHS = {b"balanced": 0.0, b"train": 1.0}
EXPECTED = "expected balanced, train, live, a number, or a list in brackets with one number per class"


class BadRequest(Exception):
    """An invalid request; the message names the input, `reason` is the kind of fault, a label of the metrics."""

    def __init__(self, reason, message):
        super().__init__(message)
        self.reason = reason


class ParsedRequest(NamedTuple):
    """A parsed request."""

    images: np.ndarray  # uint8 [n,3,S,S], or [n,3,H,W] of the canvas of task segmentation
    log_prior: np.ndarray  # [C] or [n,C]
    strength: np.ndarray  # [n,1]
    priors: Counter  # number of rows by kind of prior
    extras: tuple | None = None  # extras.Wanted
    encoded: np.ndarray | None = None  # the images as sent, bytes, [n]
    sizes: np.ndarray | None = None  # of task segmentation: height and width that each image takes in the canvas, [n,2]


class RequestParser:
    """Parses requests to one version.

    manifest: of the version, a mapping. prior, preprocess: the modules of these names in `models`, or their copies.
    live_prior: the LivePrior of the repository. no_live_prior: the exception that it raises if there is none. extras: the
    Extras of the version.
    """

    def __init__(self, manifest, prior, preprocess, live_prior, no_live_prior, extras):
        self.extras = extras
        self.prior, self.preprocess = prior, preprocess
        self.live_prior, self.no_live_prior = live_prior, no_live_prior
        self.class_count = len(manifest["classes"])
        self.log_prior = np.asarray(manifest["log_prior"], dtype=np.float64)
        self.size, self.resize_to = manifest["image"]["size"], manifest["image"]["resize_to"]
        self.interpolation = manifest["image"].get("interpolation", "bilinear")
        self.room, limits = manifest["image"].get("room", 0), manifest.get("limits", {})
        self.image_pixels = limits.get("image_pixels", IMAGE_PIXELS)
        self.request_pixels = limits.get("request_pixels", REQUEST_PIXELS)
        self.strength = float(manifest["strength"])
        self.canvas = manifest.get("segmentation")

    def parse(self, request):
        """Parse a request into `ParsedRequest`. Raises BadRequest naming the input, and the row if there are several."""
        encoded = read_input(request, "image", (1,))
        if encoded is None:
            raise BadRequest("image_missing", "image is missing; send one encoded image a row")
        # Small inputs first: a request that is rejected because of them needs no decoding.
        log_prior, strength, priors = self.read_adjustment(request, len(encoded))
        extras = self.extras.parse(request, len(encoded))
        if self.canvas:
            images, sizes = zip(*self.decode_rows(encoded[:, 0], self.letterbox), strict=True)
            return ParsedRequest(np.stack(images), log_prior, strength, priors, extras, sizes=np.array(sizes))
        return ParsedRequest(self.read_images(encoded[:, 0]), log_prior, strength, priors, extras, encoded[:, 0])

    def image_files(self, request, rows):
        """The image files of the chosen rows of a parsed request, bytes. rows: bool [n]; images of one colour are left out."""
        flat = request.images.reshape(len(request.images), -1)
        chosen = request.encoded[rows & (flat.min(axis=1) != flat.max(axis=1))]
        return [image_file(data, self.preprocess) for data in chosen]

    def read_adjustment(self, request, rows):
        """Log prior [C] or [n,C], its strength [n,1], and the number of rows by kind of prior. Raises BadRequest."""
        strength = read_input(request, "strength", (1,), rows)
        target = read_input(request, "target_prior", None, rows)
        texts = read_input(request, "prior", (1,), rows)
        if target is not None and strength is not None:
            raise BadRequest("both", "strength and target_prior exclude each other; send one of them")
        if texts is not None:
            if target is not None or strength is not None:
                raise BadRequest("both", "prior excludes strength and target_prior; send one of them")
            return self.read_priors(texts[:, 0])
        if target is not None:
            priors = parse_rows(self.check_prior, target)
            return self.prior.log_target_prior(np.stack(priors)), np.ones((rows, 1)), Counter(own=rows)
        if strength is None:
            return self.log_prior, np.full((rows, 1), self.strength), Counter({strength_kind(self.strength): rows})
        strengths = parse_rows(check_strength, strength[:, 0])
        return self.log_prior, np.array(strengths)[:, None], Counter(map(strength_kind, strengths))

    def read_priors(self, texts):
        """As read_adjustment, from the input `prior`: any kind of prior as text, so that all requests share a batch."""
        log_priors, strengths, kinds = zip(*parse_rows(self.read_prior, texts), strict=True)
        strength, counts = np.array(strengths)[:, None], Counter(kinds)
        if "own" not in counts and "live" not in counts:
            return self.log_prior, strength, counts
        return np.stack(log_priors), strength, counts

    def read_prior(self, text):
        """Log prior [C], strength and kind of one row of the input `prior`. Raises BadRequest."""
        if text in STRENGTHS:
            return self.log_prior, STRENGTHS[text], text.decode()
        if text == b"live":
            try:
                return self.live_prior.log(), 1.0, "live"
            except self.no_live_prior as error:
                raise BadRequest("live_prior", f"prior is live, but {error}") from None
        if text.startswith(b"["):
            return self.prior.log_target_prior(self.read_list(text)), 1.0, "own"
        try:
            strength = self.prior.parse_number(text.decode()) if len(text) <= NUMBER_BYTES else math.nan
        except ValueError:
            strength = math.nan
        if not abs(strength) <= LARGEST:  # also true for NaN
            raise BadRequest("prior", f"prior is {shortened(text)}; {EXPECTED}")
        return self.log_prior, strength, strength_kind(strength)

    def read_list(self, text):
        """The target prior [C] from a row of the input `prior` that is a JSON list. Raises BadRequest."""
        limit = NUMBER_BYTES * (self.class_count + 1)
        if len(text) > limit:
            raise BadRequest("prior", f"prior has {len(text)} bytes; expected at most {limit}")
        try:
            numbers = self.prior.check_numbers(json.loads(text))
        except (ValueError, TypeError, OverflowError, RecursionError):
            raise BadRequest("prior", f"prior is {shortened(text)}, no list of numbers; {EXPECTED}") from None
        if numbers.ndim != 1:
            raise BadRequest("prior", f"prior has shape {list(numbers.shape)}; {EXPECTED}")
        return self.check_prior(numbers, "prior")

    def check_prior(self, prior, name="target_prior"):
        """Check a target prior [C] of the input `name`. Raises BadRequest."""
        try:
            return self.prior.check_target_prior(prior, self.class_count)
        except ValueError as error:
            raise BadRequest(name, str(error).replace("target_prior", name, 1)) from None

    def read_images(self, encoded):
        """Decode a request's images to uint8 [n,3,S,S]. Raises BadRequest; images above the limits are not decoded."""

        def read(file, check_pixels):
            return self.preprocess.preprocess(
                file, self.size, self.resize_to, self.room, check_pixels, self.interpolation
            )

        return np.stack(self.decode_rows(encoded, read))

    def letterbox(self, file, check_pixels):
        """Decode an image to a canvas uint8 [3,H,W], and the height and width that it takes in it."""
        image = self.preprocess.decode(file, allow=check_pixels)
        return self.preprocess.letterbox(image, self.canvas["height"], self.canvas["width"], self.canvas["fill"])

    def decode_rows(self, encoded, read):
        """Apply `read` to each image file of a request, with the check of its pixels. Raises as `read_images`."""
        total = 0

        def check_pixels(pixels):
            nonlocal total
            total += pixels
            if pixels > self.image_pixels:
                raise self.preprocess.ImageError(
                    "pixels", f"has {pixels} pixels to decode, above the limit of {self.image_pixels}; make it smaller"
                )
            if total > self.request_pixels:
                raise self.preprocess.ImageError(
                    "request_pixels",
                    f"brings the request to {total} pixels, above the limit of {self.request_pixels}; "
                    "send fewer images at once",
                )

        def read_image(data):
            try:
                return read(image_file(data, self.preprocess), check_pixels)
            except self.preprocess.ImageError as error:
                reason = error.kind if error.kind == "request_pixels" else f"image_{error.kind}"
                raise BadRequest(reason, f"image {error}") from None
            except MemoryError:
                raise BadRequest(
                    "image_memory", "image needs more memory than is available; send a smaller one"
                ) from None

        return parse_rows(read_image, encoded)


def parse_rows(parse, values):
    """Apply `parse` to the value of each row. A BadRequest of a request with several rows names the row."""
    parsed = []
    for row, value in enumerate(values):
        try:
            parsed.append(parse(value))
        except BadRequest as error:
            raise BadRequest(error.reason, f"row {row}: {error}" if len(values) > 1 else str(error)) from None
    return parsed


def read_input(request, name, shape, rows=None):
    """An input's array [rows, *shape], or None if it is absent. Raises BadRequest for an array of another shape.

    shape: None for any. rows: None for any number above 0. Triton checks shapes too, but its product of huge sides
    overflows, and wrong shapes pass. For a model with optional inputs it does not check that a required one is present.
    """
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    array = tensor.as_numpy()
    wrong = array.ndim < 2 or not len(array) or (shape is not None and array.shape[1:] != shape)
    if wrong or (rows is not None and len(array) != rows):
        count = "n" if rows is None else rows
        expected = f"[{count}, {', '.join(map(str, shape or ['classes']))}]"
        raise BadRequest(f"{name}_shape", f"{name} has shape {list(array.shape)}; expected {expected}")
    return array


def image_file(data, preprocess):
    """The bytes of an image file, sent as bytes or as text `data:image/png;base64,...` (png, jpeg or webp).

    Raises ImageError for text that is not base64, and, before decoding, for text of more than MAX_BYTES bytes.
    """
    prefix = DATA_URL.match(data)
    if prefix is None:
        return data
    text, limit = memoryview(data)[prefix.end() :], preprocess.MAX_BYTES
    if len(text) > 4 * -(-limit // 3):
        raise preprocess.ImageError("bytes", f"has more than {limit} bytes")
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except binascii.Error:
        raise preprocess.ImageError(
            "base64", "is not base64 behind `;base64,`; expected A-Z, a-z, 0-9, + and /, without blanks, padded with ="
        ) from None


def check_strength(value):
    """A row of the input `strength` as a float. Raises BadRequest if it is not finite."""
    if not np.isfinite(value):
        raise BadRequest("strength", f"strength is {value:g}; expected a finite number")
    return float(value)


def shortened(text):
    """The first characters of a text, for a message."""
    return ascii(text[:40].decode(errors="replace"))


def strength_kind(strength):
    """The kind of a strength in the metrics: balanced (0), train (1) or number."""
    return {0.0: "balanced", 1.0: "train"}.get(float(strength), "number")
