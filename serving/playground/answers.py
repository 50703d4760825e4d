"""Content of the playground page: answers for one image under several priors, and a batch of files as CSV."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from models.preprocess import decode
from models.prior import parse_number
from serving.client.class_maps import Segmentation
from serving.client.extras import Extras
from serving.client.predictions import CSV_COLUMNS, Prediction, as_rows, extras_text
from serving.client.priors import LIVE, Prior
from serving.client.sync_client import Client
from serving.playground.class_maps import bars, overlay_html, share_rows
from serving.playground.extras import reasons_html
from serving.shared.errors import InputError, ServingError

MAX_PRIOR_TEXT = 1024 * 1024
SHOWN = 100  # most rows of a batch with a thumbnail
EXPECTED = "`cat: 3, dog: 1`, one number per class, or JSON; weights need not sum to 1"


@dataclass(frozen=True)
class PriorResult:
    """The result of one image under one prior. milliseconds: client latency. error: the message of a failed request."""

    title: str
    prediction: Prediction | Segmentation | None
    milliseconds: float
    error: str = ""


def answer_under_prior(
    client: Client, image: bytes, title: str, prior: Prior, extras: Extras | None = None, segments: bool = False
) -> PriorResult:
    """Classify one image, or segment it; a failure is returned as the PriorResult's error."""
    started, prediction = time.perf_counter(), None
    try:
        if segments:
            (prediction,) = client.segment([image], prior)
        else:
            (prediction,) = client.predict([image], prior, extras=extras)
    except ServingError as error:
        return PriorResult(title, None, 0.0, str(error).removeprefix(f"{client.url} refused: "))
    return PriorResult(title, prediction, 1000 * (time.perf_counter() - started))


def side_by_side(
    client: Client, image: bytes, strength: float, own: str, extras: Extras | None = None, segments: bool = False
) -> list[PriorResult]:
    """Answer one image under balanced, train, live, the slider's strength, and the typed prior `own` if not empty.

    extras: of each request; a column has the server's error where the release does not support one. segments: the
    answers are class maps, for which there is no live prior. Raises InputError for an image that cannot be read, and
    ServingError when no server responds: both concern every column.
    """
    results = [answer_under_prior(client, image, "balanced", "balanced", extras, segments)]
    if results[0].prediction is None:
        client.predict([image], "balanced")  # raises unless the extras are the cause
    live: list[tuple[str, Prior]] = [] if segments else [("live", LIVE)]
    for title, prior in (("train", "train"), *live, (f"strength {strength:g}", strength)):
        results.append(answer_under_prior(client, image, title, prior, extras, segments))
    if own.strip():
        try:
            results.append(answer_under_prior(client, image, "your own", parse_own_prior(own), extras, segments))
        except InputError as error:
            results.append(PriorResult("your own", None, 0.0, str(error)))
    return results


def parse_own_prior(text: str) -> Prior:
    """Parse a typed prior and scale it to sum to 1: `cat: 3, dog: 1`, one number per class, or a JSON list or object.

    Commas, semicolons or line ends separate entries; a class name that contains one of these needs JSON. Classes
    without a weight get 0. Raises InputError.
    """
    if len(text) > MAX_PRIOR_TEXT:
        raise InputError(f"your own prior has {len(text):,} characters; expected at most {MAX_PRIOR_TEXT:,}")
    try:
        typed = json.loads(text)
    except ValueError:
        typed = _weights(text)
    if not isinstance(typed, dict | list):
        raise InputError(f"your own prior is {text.strip()[:40]!r}; expected {EXPECTED}")
    return _normalised(typed)


def _weights(text: str) -> dict[str, float] | list[float]:
    entries = [entry.strip() for entry in re.split(r"[,;\n]", text) if entry.strip()]
    try:
        if all(":" in entry for entry in entries):
            pairs = [entry.rpartition(":") for entry in entries]
            weights = {name.strip(): parse_number(value.strip()) for name, _, value in pairs}
            if len(weights) < len(pairs):
                raise InputError("your own prior names a class twice; expected each class at most once")
            return weights
        return [parse_number(word) for entry in entries for word in entry.split()]
    except ValueError:
        raise InputError(f"your own prior is {text.strip()[:40]!r}; expected {EXPECTED}") from None


def _normalised(typed: dict[str, Any] | list[Any]) -> Prior:
    values = list(typed.values() if isinstance(typed, dict) else typed)
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    try:
        total = math.fsum(numbers)
    except (OverflowError, ValueError):
        total = math.inf
    if len(numbers) < len(values) or not 0 < total < math.inf or min(numbers) < 0:
        raise InputError(
            f"your own prior has weights that are not numbers of at least 0, or all 0; expected {EXPECTED}"
        )
    if isinstance(typed, dict):
        return {name: value / total for name, value in typed.items()}
    return [value / total for value in numbers]


def as_html(results: Sequence[PriorResult], image: bytes = b"") -> str:
    """Render the columns as HTML: top classes with bars, latency, version. Class names are escaped.

    A column is marked whose best class differs from that of the first column, or, of class maps, the share of the
    pixels that differ. image: the file, for class maps and activation maps.
    """
    columns = "".join(_column(result, results[0], image) for result in results)
    return f'<div class="columns">{columns}</div>'


def _column(result: PriorResult, first: PriorResult, image: bytes) -> str:
    title, answer, mark = f"<h3>{escape(result.title)}</h3>", result.prediction, ""
    if answer is None:
        return f'<section class="column">{title}<p class="none">{escape(result.error)}</p></section>'
    if isinstance(answer, Segmentation):
        picture, rows, parts = overlay_html(answer, image), share_rows(answer), ""
        if isinstance(first.prediction, Segmentation):
            share = (answer.class_map != first.prediction.class_map).mean()
            mark = f"{100 * share:.1f} % of the pixels have another class than {first.title}" if share else ""
    else:
        picture, rows = "", bars(zip(answer.classes, answer.probabilities, strict=True))
        parts = "".join(f'<p class="details">{escape(line)}</p>' for line in extras_text(answer))
        parts += reasons_html(answer, image)
        if first.prediction is not None and answer.classes[0] != first.prediction.classes[0]:
            mark = f"other class than {first.title}"
    details = f"{result.milliseconds:.1f} ms, version {answer.version}"
    marked = f'<p class="mark">{escape(mark)}</p>' if mark else ""
    return (
        f'<section class="column{" changed" if mark else ""}">{title}{picture}<ol>{rows}</ol>{marked}{parts}'
        f'<p class="details">{details}</p></section>'
    )


def thumbnail(image: bytes, name: str, side: int = 256) -> str:
    """Render the image as HTML, re-encoded as JPEG of at most `side` pixels. Raises ImageError for an invalid image."""
    small = decode(image, resize_to=side)
    small.thumbnail((side, side))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=85)
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    return f'<img src="data:image/jpeg;base64,{data}" alt="{escape(name)}">'


@dataclass(frozen=True)
class Batch:
    """Results of many files. csv: a row per image and class. failed: count of failed images. shown: the first SHOWN."""

    csv: Path
    failed: int
    shown: list[tuple[str, Path, Prediction | ServingError]]


def classify_batch(client: Client, files: Sequence[Path], prior: Prior) -> Batch:
    """Classify many files and write the results to a temporary CSV file.

    Gradio drops the folders of an upload, so `cat/1.jpg` and `dog/1.jpg` have the same name: repeated names are
    numbered in upload order, `1.jpg (1)` and `1.jpg (2)`. Raises InputError for an invalid prior, ServingError when no
    server responds.
    """
    failed = 0
    shown: list[tuple[str, Path, Prediction | ServingError]] = []
    with tempfile.NamedTemporaryFile(
        "w", prefix="tailor-", suffix=".csv", delete=False, encoding="utf-8", newline=""
    ) as stream:
        writer = csv.writer(stream)
        writer.writerow(CSV_COLUMNS)
        answers = client.stream(files, prior, keep_going=True)
        for name, path, answer in zip(unique_names(files), files, answers, strict=True):
            failed += isinstance(answer, ServingError)
            writer.writerows(as_rows(Path(name), answer, None))
            if len(shown) < SHOWN:
                shown.append((name, path, answer))
    return Batch(Path(stream.name), failed, shown)


def batch_table(batch: Batch) -> str:
    """Render the first images of a batch as an HTML table: thumbnail, escaped name, best class, probability."""
    rows = "".join(_batch_row(*row) for row in batch.shown)
    head = "".join(f'<th scope="col">{name}</th>' for name in ("image", "file", "class", "probability"))
    return f'<div class="batch"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _batch_row(name: str, path: Path, answer: Prediction | ServingError) -> str:
    if isinstance(answer, ServingError):
        message = str(answer).removeprefix(f"{path}: ")  # the path of the uploaded copy is of no use to the user
        return f'<tr><td></td><td>{escape(name)}</td><td class="none" colspan="2">{escape(message)}</td></tr>'
    best, probability = escape(answer.classes[0]), answer.probabilities[0]
    image = thumbnail(path.read_bytes(), name, side=64)
    return f"<tr><td>{image}</td><td>{escape(name)}</td><td>{best}</td><td>{100 * probability:.1f} %</td></tr>"


def unique_names(files: Sequence[Path]) -> list[str]:
    """Return a unique display name per file: the file name, with a number in brackets where the name repeats."""
    total, names = Counter(path.name for path in files), []
    seen: Counter[str] = Counter()
    for path in files:
        name = path.name
        if total[path.name] > 1:
            # A file may already have the name "1.jpg (2)".
            while name in total or name in names:
                seen[path.name] += 1
                name = f"{path.name} ({seen[path.name]})"
        names.append(name)
    return names
