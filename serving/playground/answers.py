"""What the page shows: one image's answers under several priors side by side, and a batch as CSV."""

from __future__ import annotations

import base64
import csv
import io
import json
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from models.preprocess import decode
from models.prior import parse_number
from serving.answers import Prediction
from serving.client import Client
from serving.display import CSV_COLUMNS, as_rows
from serving.errors import InputError, ServingError
from serving.priors import LIVE, Prior

MAX_PRIOR_TEXT = 1024 * 1024


@dataclass(frozen=True)
class Answer:
    """One image under one prior. milliseconds: from question to answer, the client's time. error: why there is none."""

    title: str
    prediction: Prediction | None
    milliseconds: float
    error: str = ""


def ask(client: Client, image: bytes, title: str, prior: Prior) -> Answer:
    """Ask for one image; what goes wrong is part of the answer."""
    started = time.perf_counter()
    try:
        (prediction,) = client.predict([image], prior)
    except ServingError as error:
        return Answer(title, None, 0.0, str(error).removeprefix(f"{client.url} refused: "))
    return Answer(title, prediction, 1000 * (time.perf_counter() - started))


def side_by_side(client: Client, image: bytes, strength: float, own: str) -> list[Answer]:
    """The answers for balanced, train, live, the strength of the slider, and a prior of one's own where one is typed.

    Raises InputError for an image that cannot be read, naming what is wrong with it, and ServingError when no server
    answers: then no column would be right.
    """
    started = time.perf_counter()
    (prediction,) = client.predict([image], "balanced")
    balanced = Answer("balanced", prediction, 1000 * (time.perf_counter() - started))
    rest = [("train", "train"), ("live", LIVE), (f"strength {strength:g}", strength)]
    answers = [balanced, *(ask(client, image, title, prior) for title, prior in rest)]
    if own.strip():
        try:
            answers.append(ask(client, image, "your own", own_prior(own)))
        except InputError as error:
            answers.append(Answer("your own", None, 0.0, str(error)))
    return answers


def own_prior(text: str) -> Prior:
    """What was typed as a prior: a JSON list or object, or numbers apart by commas, spaces or lines. Raises InputError."""
    if len(text) > MAX_PRIOR_TEXT:
        raise InputError(f"your own prior has {len(text):,} characters; expected at most {MAX_PRIOR_TEXT:,}")
    try:
        typed = json.loads(text)
    except ValueError:
        try:
            return [parse_number(word) for word in text.replace(",", " ").split()]
        except ValueError:
            raise InputError(
                'your own prior is neither numbers nor JSON; expected for example 0.7, 0.2, 0.1 or {"cat": 0.7, "dog": 0.3}'
            ) from None
    if isinstance(typed, dict | list):
        return typed
    raise InputError(f"your own prior is {text.strip()[:40]!r}; expected one number per class, summing to 1")


def as_html(answers: Sequence[Answer]) -> str:
    """The columns as HTML: the best classes with a bar each, the time, the version. Names are text, whatever they hold."""
    return f'<div class="columns">{"".join(_column(answer) for answer in answers)}</div>'


def _column(answer: Answer) -> str:
    title = f"<h3>{escape(answer.title)}</h3>"
    if answer.prediction is None:
        return f'<section class="column">{title}<p class="none">{escape(answer.error)}</p></section>'
    best = zip(answer.prediction.classes, answer.prediction.probabilities, strict=True)
    rows = "".join(
        f'<li><span class="name">{escape(name)}</span><span class="share">{100 * p:.1f} %</span>'
        f'<span class="bar" style="width:{100 * p:.2f}%" aria-hidden="true"></span></li>'
        for name, p in best
    )
    told = f"{answer.milliseconds:.1f} ms, version {answer.prediction.version}"
    return f'<section class="column">{title}<ol>{rows}</ol><p class="told">{told}</p></section>'


def thumbnail(image: bytes, name: str) -> str:
    """The image as HTML, at most 256 pixels, drawn anew from its pixels. Raises ImageError for what is no image."""
    small = decode(image)
    small.thumbnail((256, 256))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=85)
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    return f'<img src="data:image/jpeg;base64,{data}" alt="{escape(name)}">'


def batch_csv(client: Client, files: Sequence[Path], prior: Prior) -> tuple[Path, int]:
    """Answers for many files as a CSV file, a row for each image and class, and how many images failed.

    An upload keeps no folders (Gradio hands on the name alone), so that `cat/1.jpg` and `dog/1.jpg` have the same name:
    names that repeat are numbered in the order of the upload, `1.jpg (1)` and `1.jpg (2)`.
    Raises InputError for a prior that cannot be, ServingError when no server answers.
    """
    failed = 0
    with tempfile.NamedTemporaryFile(
        "w", prefix="tailor-", suffix=".csv", delete=False, encoding="utf-8", newline=""
    ) as stream:
        writer = csv.writer(stream)
        writer.writerow(CSV_COLUMNS)
        for name, answer in zip(told_apart(files), client.stream(files, prior, keep_going=True), strict=True):
            failed += isinstance(answer, ServingError)
            writer.writerows(as_rows(Path(name), answer, None))
    return Path(stream.name), failed


def told_apart(files: Sequence[Path]) -> list[str]:
    """The name of each file, with its number in brackets where several have it; no two are alike."""
    total, names = Counter(path.name for path in files), []
    seen: Counter[str] = Counter()
    for path in files:
        name = path.name
        if total[path.name] > 1:
            # A file may be called "1.jpg (2)" already.
            while name in total or name in names:
                seen[path.name] += 1
                name = f"{path.name} ({seen[path.name]})"
        names.append(name)
    return names
