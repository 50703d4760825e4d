"""The evaluation report: one HTML file with everything in it, for a browser without a network."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import jinja2

from pipeline.params import Params

TEMPLATE = Path(__file__).with_name("report.html.jinja")
MEDIA_TYPES = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}


def render_report(
    metrics: dict[str, Any], classes: list[dict[str, Any]], samples: list[dict[str, Any]], params: Params
) -> str:
    """The page as text. metrics: network → target prior → metric; classes: rows of per_class.csv; samples with bytes."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = lambda value: "n/a" if value is None else f"{value:.1%}"
    pictures = [
        {
            **sample,
            "uri": _data_uri(sample["file"], sample["bytes"]),
        }
        for sample in samples
    ]
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        metrics=metrics,
        classes=sorted(classes, key=lambda row: -row["train_count"]),
        largest=max(row["train_count"] for row in classes),
        samples=pictures,
        params=params,
        top=f"top{params.evaluate.top_k}",
    )


def _data_uri(name: str, data: bytes) -> str:
    media_type = MEDIA_TYPES[name.rpartition(".")[2]]
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
