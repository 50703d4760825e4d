"""Read the logit log of a served release, from which `tailor drift` estimates label shift."""

from __future__ import annotations

import io
import re
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from serving.repository.manifest import STUDENT_NAME, Manifest
from serving.shared.bounded_parquet import MemoryLimit, TooLargeError, read_column
from serving.shared.errors import InputError, ServingError
from serving.triton.storage.logit_log import FORMAT, classes_sha256, log_files

if TYPE_CHECKING:
    import pyarrow as pa

LIMIT = MemoryLimit(256)  # MiB per column; a file of the log has at most 4 MiB
SPAN = re.compile(r"(\d{1,9})([smhdw])")
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


@dataclass(frozen=True)
class LoggedLogits:
    """Logged images of one release in a time window, in the order of the log.

    logits: balanced, float32 [N,C]. times: milliseconds since the epoch, int64 [N]. in_window: number of images in
    the window, N or more. others: number of images of other releases in the window, by version. skipped: unusable file →
    reason.
    """

    logits: np.ndarray
    times: np.ndarray
    in_window: int
    others: dict[int, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


class _UnusableFile(Exception):
    """A file of the log cannot be used; the message is the reason."""


def read_logits(
    folder: Path,
    manifest: Manifest,
    since: float = -np.inf,
    until: float = np.inf,
    *,
    most: int = 10_000,
    seed: int = 0,
) -> LoggedLogits:
    """Read the logged logits of the release with this manifest; of more than `most` images, a random sample.

    since, until: seconds since the epoch, until exclusive. The same seed and files give the same sample. One file is in
    memory at a time. Other files in the folder are ignored; damaged ones, or those of other classes, are in `skipped`.
    Raises InputError if the folder cannot be read, ServingError if it has no log files.
    """
    if most < 1:
        raise InputError(f"most is {most}; expected at least 1")
    files = _files(folder)
    student_sha256, random = manifest.files[STUDENT_NAME], np.random.default_rng(seed)
    sampled = [(np.empty(0), np.empty(0, dtype=np.int64), np.empty((0, len(manifest.classes)), dtype=np.float32))]
    others: dict[int, int] = {}
    skipped: dict[str, str] = {}
    in_window = 0
    for path in files:
        try:
            version, student, times, logits = _read(path, manifest)
        except FileNotFoundError:  # the server has just deleted its oldest file
            continue
        except _UnusableFile as reason:
            skipped[path.name] = str(reason)
            continue
        inside = (times >= since * 1000) & (times < until * 1000)
        if student != student_sha256:
            others[version] = others.get(version, 0) + int(inside.sum())
            continue
        in_window += int(inside.sum())
        # Uniform sample over files: each row draws a random number, and the rows with the smallest numbers stay.
        sampled.append((random.random(len(times))[inside], times[inside], logits[inside]))
        if sum(len(draws) for draws, _, _ in sampled) > 2 * most:
            sampled = [_smallest(sampled, most)]
    _, times, logits = _smallest(sampled, most)
    return LoggedLogits(logits, times, in_window, {v: n for v, n in others.items() if n}, skipped)


def parse_time(text: str, option: str, now: float | None = None) -> float:
    """Parse `24h` or `7d` (that long before `now`) or an ISO 8601 date and time into seconds since the epoch.

    A time without a zone is local time. option: for the message of the InputError for other text.
    """
    if span := SPAN.fullmatch(text.strip()):
        return (time.time() if now is None else now) - int(span[1]) * SECONDS[span[2]]
    try:
        return datetime.fromisoformat(text.strip()).timestamp()
    except (ValueError, OverflowError):
        raise InputError(f"{option} is {text!r}; expected a time such as 24h, 7d or 2026-11-24T10:00") from None


def _files(folder: Path) -> list[Path]:
    hint = "start `tailor serve --log-logits FOLDER`, or give the folder that it logs in"
    try:
        files = log_files(folder)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}; {hint}") from None
    if not files:
        raise ServingError(f"{folder}: holds no logged logits; {hint}")
    return files


def _read(path: Path, manifest: Manifest) -> tuple[int, str, np.ndarray, np.ndarray]:
    """Read one file: version, sha256 of the student, times and logits. Raises _UnusableFile and FileNotFoundError."""
    import pyarrow as pa
    import pyarrow.parquet

    try:
        LIMIT.check("the file", path.stat().st_size)
        data = path.read_bytes()
        # Not read_table: its threads abort a program that exits immediately afterwards (pyarrow 24).
        with pyarrow.parquet.ParquetFile(pa.BufferReader(data)) as file:
            names = file.schema_arrow.names
            columns = {name: read_column(file, name, LIMIT, stream=io.BytesIO(data)) for name in dict.fromkeys(names)}
            table = pa.table(columns, metadata=file.schema_arrow.metadata)
    except FileNotFoundError:
        raise
    except TooLargeError as error:
        raise _UnusableFile(str(error)) from None
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise _UnusableFile(f"is damaged ({str(error).splitlines()[0][:100]})") from None
    metadata = {key.decode(): value.decode(errors="replace") for key, value in (table.schema.metadata or {}).items()}
    if metadata.get("tailor_logits") != FORMAT:
        raise _UnusableFile(f"is no log of logits of format {FORMAT}")
    if metadata.get("classes_sha256") != classes_sha256(manifest.classes):
        raise _UnusableFile(f"is of other classes than version {manifest.version}")
    if not metadata.get("version", "").isdecimal() or not _has_columns(table, len(manifest.classes)):
        raise _UnusableFile("is damaged (not the columns of a log of logits)")
    logits = table["logits"].combine_chunks().flatten().to_numpy().reshape(-1, len(manifest.classes))
    if not np.isfinite(logits).all():
        raise _UnusableFile("is damaged (a logit is not finite)")
    times = table["time"].cast(pa.int64()).to_numpy()
    return int(metadata["version"]), metadata.get("student_sha256", ""), times, logits


def _has_columns(table: pa.Table, classes: int) -> bool:
    import pyarrow as pa

    expected = {"time": pa.timestamp("ms", tz="UTC"), "logits": pa.list_(pa.float32(), classes)}
    actual = {name: table.schema.field(name).type for name in table.schema.names}
    no_nulls = all(column.null_count == 0 for column in table.columns)
    return actual == expected and no_nulls and table["logits"].combine_chunks().flatten().null_count == 0


def _smallest(
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]], number: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The `number` rows with the smallest random numbers, in their order."""
    draws, times, logits = (np.concatenate(column) for column in zip(*parts, strict=True))
    chosen = np.sort(np.argsort(draws, kind="stable")[:number])
    return draws[chosen], times[chosen], logits[chosen]
