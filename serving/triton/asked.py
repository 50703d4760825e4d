"""Parse a request to `classifier`: decode its images and check the prior of each row.

Runs in the inference process, with numpy. preprocess.py decodes the images; prior.py checks and computes priors.
"""

from __future__ import annotations

import binascii
import json
import math
import re
from collections import Counter

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


class Refused(Exception):
    """An invalid request; the message names the input, `reason` is the kind of fault, a label of the metrics."""

    def __init__(self, reason, message):
        super().__init__(message)
        self.reason = reason


class Asked:
    """A parsed request: images uint8 [n,3,S,S], log prior [C] or [n,C] and its strength [n,1]."""

    def __init__(self, images, log_prior, strength, priors):
        self.images, self.log_prior, self.strength = images, log_prior, strength
        self.priors = priors  # number of rows by kind of prior


class Reader:
    """Parses requests to one version.

    manifest: of the version, a mapping. prior, preprocess: the modules of these names in `models`, or their copies.
    live_prior: the LivePrior of the repository. no_live_prior: the exception that it raises if there is none.
    """

    def __init__(self, manifest, prior, preprocess, live_prior, no_live_prior):
        self.prior, self.preprocess = prior, preprocess
        self.live_prior, self.no_live_prior = live_prior, no_live_prior
        self.classes = len(manifest["classes"])
        self.log_prior = np.asarray(manifest["log_prior"], dtype=np.float64)
        self.size, self.resize_to = manifest["image"]["size"], manifest["image"]["resize_to"]
        self.interpolation = manifest["image"].get("interpolation", "bilinear")
        self.room, limits = manifest["image"].get("room", 0), manifest.get("limits", {})
        self.image_pixels = limits.get("image_pixels", IMAGE_PIXELS)
        self.request_pixels = limits.get("request_pixels", REQUEST_PIXELS)
        self.strength = float(manifest["strength"])

    def read(self, request):
        """Parse a request into `Asked`. Raises Refused naming the input, and the row if the request has several."""
        encoded = read_input(request, "image", (1,))
        if encoded is None:
            raise Refused("image_missing", "image is missing; send one encoded image a row")
        encoded, rows = encoded[:, 0], len(encoded)
        # Small inputs first: a request that is rejected because of them needs no decoding.
        log_prior, strength, kinds = self.read_adjustment(request, rows)
        return Asked(self.read_images(encoded), log_prior, strength, kinds)

    def read_adjustment(self, request, rows):
        """Log prior [C] or [n,C], its strength [n,1], and the number of rows by kind of prior. Raises Refused."""
        strength = read_input(request, "strength", (1,), rows)
        target = read_input(request, "target_prior", None, rows)
        named = read_input(request, "prior", (1,), rows)
        if target is not None and strength is not None:
            raise Refused("both", "strength and target_prior exclude each other; send one of them")
        if named is not None:
            if target is not None or strength is not None:
                raise Refused("both", "prior excludes strength and target_prior; send one of them")
            return self.read_named(named[:, 0])
        if target is not None:
            checked = [self.checked(p, row, rows) for row, p in enumerate(target)]
            return self.prior.log_target_prior(np.stack(checked)), np.ones((rows, 1)), Counter(own=rows)
        if strength is None:
            return self.log_prior, np.full((rows, 1), self.strength), Counter({kind_of(self.strength): rows})
        strength = strength.astype(np.float64)
        for row, value in enumerate(strength[:, 0]):
            if not np.isfinite(value):
                raise Refused("strength", f"{at(row, rows)}strength is {value:g}; expected a finite number")
        return self.log_prior, strength, Counter(map(kind_of, strength[:, 0]))

    def read_named(self, texts):
        """As read_adjustment, from the input `prior`: any kind of prior as text, so that all requests share a batch."""
        found = [self.read_text(text, row, len(texts)) for row, text in enumerate(texts)]
        kinds = Counter(kind for _, _, kind in found)
        strength = np.array([[value] for _, value, _ in found])
        if "own" not in kinds and "live" not in kinds:
            return self.log_prior, strength, kinds
        return np.stack([log_prior for log_prior, _, _ in found]), strength, kinds

    def read_text(self, text, row, rows):
        """Log prior [C], strength and kind of one row of the input `prior`. Raises Refused."""
        if text in STRENGTHS:
            return self.log_prior, STRENGTHS[text], text.decode()
        if text == b"live":
            try:
                return self.live_prior.log(), 1.0, "live"
            except self.no_live_prior as error:
                raise Refused("live_prior", f"{at(row, rows)}prior is live, but {error}") from None
        if text.startswith(b"["):
            return self.prior.log_target_prior(self.read_list(text, row, rows)), 1.0, "own"
        try:
            strength = self.prior.parse_number(text.decode()) if len(text) <= NUMBER_BYTES else math.nan
        except ValueError:
            strength = math.nan
        if not abs(strength) <= LARGEST:  # also true for NaN
            shown = ascii(text[:40].decode(errors="replace"))
            raise Refused("prior", f"{at(row, rows)}prior is {shown}; {EXPECTED}")
        return self.log_prior, strength, kind_of(strength)

    def read_list(self, text, row, rows):
        """The target prior [C] from a row of the input `prior` that is a JSON list. Raises Refused."""
        limit = NUMBER_BYTES * (self.classes + 1)
        if len(text) > limit:
            raise Refused("prior", f"{at(row, rows)}prior has {len(text)} bytes; expected at most {limit}")
        try:
            numbers = self.prior.check_numbers(json.loads(text))
        except (ValueError, TypeError, OverflowError, RecursionError):
            shown = ascii(text[:40].decode(errors="replace"))
            raise Refused("prior", f"{at(row, rows)}prior is {shown}, no list of numbers; {EXPECTED}") from None
        if numbers.ndim != 1:
            raise Refused("prior", f"{at(row, rows)}prior has shape {list(numbers.shape)}; {EXPECTED}")
        return self.checked(numbers, row, rows, "prior")

    def checked(self, prior, row, rows, name="target_prior"):
        """Check a target prior [C] of the input `name`. Raises Refused."""
        try:
            return self.prior.check_target_prior(prior, self.classes)
        except ValueError as error:
            said = str(error).replace("target_prior", name, 1)
            raise Refused(name, f"{at(row, rows)}{said}") from None

    def read_images(self, encoded):
        """Decode a request's images to uint8 [n,3,S,S]. Raises Refused; images above the limits are not decoded."""
        images, total = [], 0

        def allow(pixels):
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

        for row, data in enumerate(encoded):
            try:
                file = image_file(data, self.preprocess)
                images.append(
                    self.preprocess.preprocess(file, self.size, self.resize_to, self.room, allow, self.interpolation)
                )
            except self.preprocess.ImageError as error:
                reason = error.kind if error.kind == "request_pixels" else f"image_{error.kind}"
                raise Refused(reason, f"{at(row, len(encoded))}image {error}") from None
            except MemoryError:
                raise Refused(
                    "image_memory",
                    f"{at(row, len(encoded))}image needs more memory than there is; send a smaller one",
                ) from None
        return np.stack(images)


def read_input(request, name, shape, rows=None):
    """An input's array [rows, *shape], or None if it is absent. Raises Refused for an array of another shape.

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
        raise Refused(f"{name}_shape", f"{name} has shape {list(array.shape)}; expected {expected}")
    return array


def image_file(data, preprocess):
    """The bytes of an image file, sent as bytes or as text `data:image/png;base64,...` (png, jpeg or webp).

    Raises ImageError for text that is not base64, and, before decoding, for text of more than MAX_BYTES bytes.
    """
    prefix = DATA_URL.match(data)
    if prefix is None:
        return data
    text, most = memoryview(data)[prefix.end() :], preprocess.MAX_BYTES
    if len(text) > 4 * -(-most // 3):
        raise preprocess.ImageError("bytes", f"has more than {most} bytes")
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except binascii.Error:
        raise preprocess.ImageError(
            "base64", "is not base64 behind `;base64,`; expected A-Z, a-z, 0-9, + and /, without blanks, padded with ="
        ) from None


def at(row, rows):
    """The prefix of a message that names its row; '' for a request with one row."""
    return f"row {row}: " if rows > 1 else ""


def kind_of(strength):
    """The kind of a strength in the metrics: balanced (0), train (1) or number."""
    return {0.0: "balanced", 1.0: "train"}.get(float(strength), "number")
