"""A page with everything in it: one HTML file for any browser, which asks nothing of a network and runs no foreign script."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from pipeline.intervals import Estimate

FOLDER = Path(__file__).parent


def render_page(template: str, data: Mapping[str, Any], **context: Any) -> str:
    """The page of a template in this folder as text.

    data: what page.js reads, `figures` (name → plotly figure) among it. Templates escape what they print, `data` cannot
    end its element, and the page's own policy lets a browser run its two scripts by their hashes and load nothing. Without
    the package plotly, as on a machine that only trains, the charts stay out and the page says so.
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


def _hash(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"
