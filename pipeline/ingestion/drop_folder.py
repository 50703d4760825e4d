"""The drop folder: labelled images that somebody else writes, and which of them are written."""

from __future__ import annotations

import os
import stat
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from models.image_names import has_image_suffix, is_passed_over, is_utf8
from models.prior import class_key
from pipeline.params import IngestParams
from pipeline.shared.errors import DataError
from pipeline.sources.shards import RowGroups, Shard, image_bytes
from pipeline.sources.source import BadImageError, read_image_file, reading_order
from pipeline.sources.storage import Storage
from pipeline.sources.table import WHOLE_NUMBER
from serving.shared.bounded_parquet import MIB, MemoryLimit
from serving.shared.terminal import counted, print

MARKER = ".complete"
ROW_BYTES = 1024  # that a DropRow of a table takes, with its name, its path and what reads it
LONGEST_PATH = 200  # characters of one that are told
TABLE_SUFFIXES = {".csv", ".parquet"}
Stamp = tuple[int, int, int]  # inode, bytes, time of change of the content in nanoseconds


@dataclass(frozen=True)
class DropRow:
    """One image of the drop, not yet read.

    name: its place in the folder, a row of a table as `labels.csv#3`. label: class name or number; None where there is
    none. read: its encoded bytes; raises BadImageError or DataError. file: its own file, if it is one. problem: kind and
    words of what is wrong before anything is read.
    """

    name: str
    label: str | int | None
    read: Callable[[], bytes]
    file: Path | None = None
    problem: tuple[str, str] | None = None


@dataclass
class Drop:
    """rows: what can be judged now. files: every file that they come from, as it was then. waiting: files left for later."""

    root: Path
    rows: list[DropRow] = field(default_factory=list)
    files: dict[Path, Stamp] = field(default_factory=dict)
    waiting: int = 0


def stamp_of(path: Path) -> Stamp | None:
    """What changes when a file is written anew; None where it is not there."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def read_drop(root: Path, params: IngestParams, classes: list[str]) -> Drop:
    """What lies in a drop folder: a folder per class (a name of `classes` may be several folders deep), or tables of paths
    or images with a label column.

    A table in the folder itself claims the images that it names; their folders are then no classes. Hidden files are
    passed over, links that lead out of the folder are never followed. Files that may still be being written wait:
    those changed in the last settle_seconds, a table and all that it names together, and under require_marker whatever
    has no `.complete` beside it or in the drop folder.
    """
    root = Path(os.path.normpath(root))
    drop = Drop(root)
    # Before the files: a marker that comes while they are looked for is that of the next batch, and stays for it.
    markers = {path: stamp for path in _possible_markers(root) if (stamp := stamp_of(path)) is not None}
    found = {path: stamp for path in _files(root) if (stamp := stamp_of(path)) is not None}
    waiting = _unsettled(found, params.settle_seconds)
    if params.require_marker:
        waiting |= {path for path in found if not _markers_of(root, [path]) & markers.keys()}
    tables = [path for path in found if path.parent == root and path.suffix.lower() in TABLE_SUFFIXES]
    claimed: set[Path] = set()
    for table in tables:
        if table not in waiting:
            rows, named = _table_rows(root, table, params)
            claimed |= named
            # Many small tables of many rows: what does not fit beside the others is read in the next run.
            full = drop.rows and (len(drop.rows) + len(rows)) * ROW_BYTES > params.max_table_mib * MIB
            if named & waiting or full:
                waiting |= named | {table}
            else:
                drop.rows += rows
                drop.files |= {path: found[path] for path in (table, *named) if path in found}
    known = set(classes)
    folders_of_tables = {_top(root, path) for path in claimed}
    for path in found.keys() - claimed - set(tables):
        if path in waiting or waiting & set(tables) or (path.parent != root and _top(root, path) in folders_of_tables):
            waiting.add(path)
        elif path.parent != root or has_image_suffix(path):
            drop.rows.append(_folder_row(root, path, known))
            drop.files[path] = found[path]
    drop.files |= {path: markers[path] for path in _markers_of(root, drop.files) & markers.keys()}  # used up
    order = reading_order([row.name for row in drop.rows])
    drop.rows = [drop.rows[i] for i in order]
    drop.waiting = len(waiting & found.keys())
    return drop


def _files(root: Path) -> Iterator[Path]:
    unfit = 0
    for folder, folders, names in os.walk(root):
        fit = [name for name in names if is_utf8(name)]
        unfit += len(names) - len(fit) + sum(not is_utf8(name) for name in folders)
        folders[:] = sorted(name for name in folders if not is_passed_over(Path(name)) and is_utf8(name))
        yield from (Path(folder) / name for name in sorted(fit) if not is_passed_over(Path(name)))
    if unfit:
        print(
            f"ingest: {root}: {counted(unfit, 'name', 'are')} not UTF-8 and passed over; rename them", file=sys.stderr
        )


def _unsettled(found: dict[Path, Stamp], seconds: float) -> set[Path]:
    """Files changed in the last so many seconds, by ctime, which a copy that keeps times cannot set back.

    Files of the future, after the clock was set back, say nothing of their age: they are watched for as long instead.
    """
    now = time.time()
    ages = {path: now - _changed(path) for path in found} if seconds else {}
    young = {path for path, age in ages.items() if 0 <= age < seconds}
    future = {path: _changed(path) for path, age in ages.items() if age < 0}
    if future:
        print(
            f"ingest: {counted(len(future), 'file', 'are')} dated in the future, as after a clock was set back; "
            f"watching them for "
            f"{seconds:g} s",
            file=sys.stderr,
        )
        time.sleep(seconds)
        young |= {path for path, changed in future.items() if _changed(path) != changed}
    return young


def _changed(path: Path) -> float:
    try:
        return path.lstat().st_ctime
    except OSError:
        return time.time()  # gone meanwhile: as young as can be


def _possible_markers(root: Path) -> Iterator[Path]:
    places = (root / MARKER, *(path / MARKER for path in root.iterdir() if not path.name.startswith(".")))
    yield from (path for path in places if path.is_file())


def _markers_of(root: Path, paths: Collection[Path]) -> set[Path]:
    """The markers, there or not, that stand for some files."""
    tops = {_top(root, path) for path in paths if path.parent != root}
    return {root / MARKER, *(top / MARKER for top in tops)} if paths else set()


def _top(root: Path, path: Path) -> Path:
    return root / path.relative_to(root).parts[0]


def _inside(root: Path, path: Path) -> bool:
    try:
        return path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError):  # a link to itself, a name that no file can have
        return False


def _problem(root: Path, path: Path) -> tuple[str, str] | None:
    """Why a file of the drop is not to be opened: reading a pipe would wait for ever."""
    if not _inside(root, path):
        return "outside", "is a link that leads out of the drop folder, or to itself"
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        return "unreadable", f"{path}: {error.strerror}"
    return None if regular else ("unreadable", f"{path}: is not a regular file")


def _named(root: Path, path: str) -> Path | None:
    """The place in the drop that a row of a table names; None where that is no place inside."""
    if "\0" in path:
        return None
    place = Path(os.path.relpath(root.absolute() / path, root.absolute()))
    return root / place if place.parts[:1] not in ((), ("..",)) and _inside(root, root / place) else None


def _folder_row(root: Path, path: Path, known: set[str]) -> DropRow:
    name = path.relative_to(root)
    read = partial(read_image_file, path)
    if len(name.parts) == 1:
        return DropRow(str(name), None, read, path, ("no label", "lies beside the class folders"))
    parents = [class_key("/".join(name.parts[:depth])) for depth in range(1, len(name.parts))]
    label = next((parent for parent in parents if parent in known), parents[0])
    return DropRow(name.as_posix(), label, read, path, _problem(root, path))


def _table_rows(root: Path, table: Path, params: IngestParams) -> tuple[list[DropRow], set[Path]]:
    """Rows of a table, and the files that it names. A table that cannot be read is one row with that problem."""
    columns = params.columns
    if problem := _problem(root, table):
        return [DropRow(table.name, None, partial(read_image_file, table), table, problem)], set()
    limit = _limit(params)
    try:
        shard = Shard(Storage(str(root)), table.name, [columns.label, columns.path], limit)
        column = columns.image if columns.image in shard.names else columns.path
        shard.check_column(column)
        labels = shard.column(columns.label).to_pylist()
        paths = shard.column(column).to_pylist() if column == columns.path else [None] * len(labels)
    except DataError as error:
        return [DropRow(table.name, None, partial(read_image_file, table), table, ("table", str(error)))], set()
    images, as_text = RowGroups(column), table.suffix.lower() == ".csv"
    rows, named = [], set()
    for index, (label, path) in enumerate(zip(labels, paths, strict=True)):
        file = _named(root, path) if isinstance(path, str) else None
        problem = None
        if file is not None:
            problem = _problem(root, file)
            named.add(file)
        elif isinstance(path, str):
            problem = ("outside", f"names {path[:LONGEST_PATH]!r}, which is no place inside the drop folder")
        read = partial(read_image_file, file) if file else partial(_cell, images, shard, index)
        rows.append(DropRow(f"{table.name}#{index}", _label(label, as_text), read, file, problem))
    return rows, named


def _limit(params: IngestParams) -> MemoryLimit:
    return MemoryLimit(params.max_table_mib, "ingest.max_table_mib", ROW_BYTES)


def _label(value: object, as_text: bool) -> str | int | None:
    """A label that is one. A CSV file has text alone: `7` may be a number, `007` is a name and nothing else."""
    if as_text and isinstance(value, str) and WHOLE_NUMBER.fullmatch(value):
        return int(value)
    return value if isinstance(value, str | int) and not isinstance(value, bool) else None


def _cell(images: RowGroups, shard: Shard, index: int) -> bytes:
    value = image_bytes(images.value(shard, index))
    if not isinstance(value, bytes):
        raise BadImageError(f"{shard.place}: row {index} holds {type(value).__name__}; expected encoded image bytes")
    return value
