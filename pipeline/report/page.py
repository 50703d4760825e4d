"""Render a self-contained HTML page: one file, no network requests, only the page's two scripts run."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from models.label_map_image import activation_overlay
from models.preprocess import decode
from pipeline.evaluation.intervals import Estimate

FOLDER = Path(__file__).parent
SIDE = 96  # pixels of the longer side of a thumbnail, at most


def render_page(template: str, data: Mapping[str, Any], **context: Any) -> str:
    """Render a template of this folder as HTML text.

    data: JSON for page.js, with `figures` (name → plotly figure). Templates escape their values, `data` cannot end its
    script element, and the page's Content-Security-Policy allows only its two scripts, by hash, and no requests.
    Without the package plotly, as on a training machine, the page has no charts and a note about it. Without figures it
    does not contain plotly.js.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"percent": percent, "points": points, "number": "{:,}".format}
    charts, script = plotly_js() if data.get("figures") else "", (FOLDER / "page.js").read_text(encoding="utf-8")
    return environment.get_template(template).render(
        **context,
        data=as_script(data),
        charts=None if charts is None else Markup(charts),
        script=Markup(script),
        style=Markup((FOLDER / "page.css").read_text(encoding="utf-8")),
        hashes=" ".join(_hash(source) for source in (charts, script) if source),
    )


def plotly_js() -> str | None:
    """Source of plotly.js (4.8 MB) from the Python package plotly; None if the package is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError:
        return None
    # No release so far contains "</script", which would end the script element and break the page.
    source = get_plotlyjs()
    if "</script" in source.lower():
        raise ValueError("plotly.js contains </script; install another release of plotly")
    return source


def as_script(content: Any) -> Markup:
    """JSON for a script element, escaped so that it cannot end the element or open a comment or a tag."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def percent(value: float | Estimate | None) -> str:
    """Format a share as a percentage; n/a for None."""
    number = value.value if isinstance(value, Estimate) else value
    return "n/a" if number is None else f"{number:.1%}"


def points(value: float | None) -> str:
    """Format a difference of shares in percentage points, with its sign; n/a for None."""
    return "n/a" if value is None else f"{100 * value:+.1f}".replace("-", "−")


def thumbnail(data: bytes) -> str:
    """Data URI of a thumbnail of an encoded image, at most SIDE pixels wide and high: a few kilobytes.

    The image is decoded and encoded again, so that only its pixels get into the page. Raises ImageError as
    `models.preprocess.decode` does.
    """
    image = decode(data)
    factor = SIDE // max(image.size)
    enlarged = factor > 1
    if enlarged:  # enlarge a small image by a whole factor, because a browser would blur it
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    else:
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "WEBP", lossless=enlarged, quality=100 if enlarged else 72, method=4)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"


def activation_uri(data: bytes, values: np.ndarray, crop: float) -> str:
    """Data URI of the part of an image that the network sees, SIDE pixels wide and high, under its activation map [h,w].

    crop: as of `models.label_map_image.activation_overlay`.
    """
    stream = io.BytesIO()
    activation_overlay(data, values, crop, SIDE).save(stream, "WEBP", quality=72, method=4)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _hash(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"
