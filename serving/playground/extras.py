"""Extra parts of an answer on the playground page: the typed requests, and images that explain an answer."""

from __future__ import annotations

import base64
import io
from html import escape

from models.label_map_image import activation_overlay
from models.prior import parse_number
from serving.client.extras import Extras
from serving.client.predictions import Prediction
from serving.shared.errors import InputError

MAX_NUMBER = 40  # characters of a typed number
SIDE = 256  # pixels of the activation map's picture


def parse_extras(
    coverage: str | None, level: str | None, ask: str | None, false_alarms: str | None, explain: bool
) -> Extras | None:
    """The extras of a request from typed numbers; an empty text is off, and so is None, the value of an untouched box.

    Returns None if all are off. Raises InputError.
    """
    typed = {"coverage": coverage, "level": level, "ask": ask, "false_alarms": false_alarms}
    numbers = {name: _number(name, text) for name, text in typed.items() if text and text.strip()}
    if not numbers and not explain:
        return None
    return Extras(
        coverage=numbers.get("coverage"), ask=numbers.get("ask"), false_alarms=numbers.get("false_alarms"),
        level=numbers.get("level"), explain=explain or None,
    )  # fmt: skip


def _number(name: str, text: str) -> float:
    try:
        return parse_number(text.strip()[: MAX_NUMBER + 1])
    except ValueError:
        raise InputError(f"{name} is {text.strip()[:MAX_NUMBER]!r}; expected a number") from None


def reasons_html(prediction: Prediction, image: bytes) -> str:
    """Render the nearest training images that have a thumbnail, and the activation map; empty without either."""
    near = "".join(
        f'<img src="data:image/jpeg;base64,{base64.b64encode(each.thumbnail).decode("ascii")}" '
        f'alt="{escape(each.name)}" title="{escape(each.label)}">'
        for each in prediction.nearest or ()
        if each.thumbnail
    )
    near = near and f'<div class="nearest">{near}</div>'
    if prediction.activation_map is None:
        return near
    return near + (
        f'<img class="map" src="data:image/png;base64,{overlay(image, prediction)}" '
        f'alt="activation map of {escape(prediction.classes[0])}">'
        '<p class="details">activation map, red is high, on the part of the image that the network sees</p>'
    )


def overlay(image: bytes, prediction: Prediction) -> str:
    """The part of the image that the network sees, under the activation map of the prediction: a PNG in base64."""
    stream, crop = io.BytesIO(), prediction.activation_crop or 1.0
    activation_overlay(image, prediction.activation_map or (), crop, SIDE).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode("ascii")
