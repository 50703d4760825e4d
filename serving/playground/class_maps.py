"""Class maps on the playground page: the image with the class colours over it, and the share of each class."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from html import escape

from models.label_map_image import palette
from models.preprocess import decode
from serving.client.class_maps import Segmentation

SIDE = 512  # pixels of the longer side of an overlay, at most


def overlay_html(answer: Segmentation, image: bytes) -> str:
    """Render the image with the class colours over it. image: the file. Raises ImageError for an invalid image."""
    picture = answer.overlay(decode(image))
    picture.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    return f'<img class="map" src="data:image/png;base64,{data}" alt="class map over the image">'


def share_rows(answer: Segmentation) -> str:
    """Render a row for each class of the class map, largest first: colour, escaped name, share of the pixels."""
    indexes = {name: index for index, name in enumerate(answer.classes)}
    colours = {name: palette()[3 * index : 3 * index + 3] for name, index in indexes.items()}
    return bars(answer.shares().items(), {name: f"rgb{tuple(rgb)}" for name, rgb in colours.items()})


def bars(shares: Iterable[tuple[str, float]], colours: dict[str, str] | None = None) -> str:
    """Render a row with a bar for each escaped name and its share in 0..1. colours: CSS colour of each name's bar."""
    rows = []
    for name, share in shares:
        colour = f";background:{colours[name]}" if colours else ""
        rows.append(
            f'<li><span class="name">{escape(name)}</span><span class="share">{100 * share:.1f} %</span>'
            f'<span class="bar" style="width:{100 * share:.2f}%{colour}" aria-hidden="true"></span></li>'
        )
    return "".join(rows)
