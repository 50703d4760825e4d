"""A self-contained HTML page: one file for any browser that loads nothing from a network and runs no other scripts."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from models.preprocess import decode
from pipeline.evaluation.intervals import Estimate

FOLDER = Path(__file__).parent
SIDE = 96  # pixels of the longer side of a thumbnail, at most


def render_page(template: str, data: Mapping[str, Any], **context: Any) -> str:
    """The page of a template in this folder as text.

    data: what page.js reads, `figures` (name → plotly figure) among it. Templates escape what they print, `data` cannot
    end its element, and the page's own policy lets a browser run its two scripts by their hashes and load nothing. Without
    the package plotly, as on a machine that only trains, the charts are left out and the page notes it.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"percent": percent, "points": points, "number": "{:,}".format}
    charts, script = plotly_js(), (FOLDER / "page.js").read_text(encoding="utf-8")
    return environment.get_template(template).render(
        **context,
        data=as_script(data),
        charts=None if charts is None else Markup(charts),
        script=Markup(script),
        style=Markup((FOLDER / "page.css").read_text(encoding="utf-8")),
        hashes=" ".join(_hash(source) for source in (charts, script) if source),
    )


def plotly_js() -> str | None:
    """plotly.js as its Python package brings it, 4.8 MB, the only bundle in the package; None where it is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError:
        return None
    # "</script" stands in none of its releases so far; a page that it would cut short must not be written.
    source = get_plotlyjs()
    if "</script" in source.lower():
        raise ValueError("plotly.js holds </script; pin another release of plotly")
    return source


def as_script(content: Any) -> Markup:
    """JSON for a script element: no character of it can end the element, open a comment or a tag."""
    found = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        found = found.replace(character, f"\\u{ord(character):04x}")
    return Markup(found)


def percent(value: float | Estimate | None, digits: int = 1) -> str:
    """A share as a percentage; n/a where there is none."""
    number = value.value if isinstance(value, Estimate) else value
    return "n/a" if number is None else f"{number:.{digits}%}"


def points(value: float | None, digits: int = 1) -> str:
    """A difference of shares in percentage points, with its sign; n/a where there is none."""
    return "n/a" if value is None else f"{100 * value:+.{digits}f}".replace("-", "−")


def thumbnail(data: bytes) -> str:
    """A data URI of an encoded image, at most SIDE pixels wide and high: a few kilobytes for any image.

    Decoded and encoded again, so that only the pixels of the file get into the page. Raises ImageError as
    `models.preprocess.decode` does.
    """
    image = decode(data)
    times = SIDE // max(image.size)
    exact = times > 1
    if exact:  # a browser would blur a small image; its pixels are shown unchanged
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    else:
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "WEBP", lossless=exact, quality=100 if exact else 72, method=4)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _hash(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"
