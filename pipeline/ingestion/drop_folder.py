"""Read the drop folder: list its labelled images and tables, and detect files that are still being written."""

from __future__ import annotations

import os
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from models.image_names import FOLDER_LINK, has_image_suffix, is_passed_over, is_utf8
from models.prior import class_key
from pipeline.data.groups import COLUMN, stored_group
from pipeline.params import IngestParams
from pipeline.shared.errors import DataError
from pipeline.sources.shards import RowGroupCache, Shard, image_bytes
from pipeline.sources.source import BadImageError, read_image_file, reading_order
from pipeline.sources.storage import Storage
from pipeline.sources.table import WHOLE_NUMBER
from serving.shared.bounded_parquet import MIB, MemoryLimit
from serving.shared.terminal import counted, print

MARKER = ".complete"
ROW_BYTES = 1024  # memory of a table's DropRow, with its name, path and read function
MAX_PATH = 200  # characters of a path that a message shows
TABLE_SUFFIXES = {".csv", ".parquet"}
Stamp = tuple[int, int, int]  # inode, size in bytes, mtime in nanoseconds


@dataclass(frozen=True)
class DropRow:
    """One labelled image of the drop folder, not read yet.

    name: path in the folder; for a row of a table `labels.csv#3`. label: class name or number; None if missing. read:
    returns the encoded bytes; raises BadImageError or DataError. file: path of the image file; None if the bytes are in
    a table. problem: (kind, text) of a problem that is known before the image is read. group: by data.group, from the
    path or a column of the table; None if it has none.
    """

    name: str
    label: str | int | None
    read: Callable[[], bytes]
    file: Path | None = None
    problem: tuple[str, str] | None = None
    group: str | None = None


@dataclass
class Drop:
    """Content of a drop folder.

    rows: images that can be checked now. files: the files of these rows and the used markers, each with its stamp.
    waiting: number of files that may still be being written and are left for a later run.
    """

    root: Path
    rows: list[DropRow] = field(default_factory=list)
    files: dict[Path, Stamp] = field(default_factory=dict)
    waiting: int = 0


class Clock:
    """Times of the wall clock and of files, in seconds."""

    now = staticmethod(time.time)
    sleep = staticmethod(time.sleep)

    def ctime(self, path: Path) -> float:
        """Time of the last change of a file; the current time if it was deleted meanwhile."""
        try:
            return path.lstat().st_ctime
        except OSError:
            return self.now()


def stamp_of(path: Path) -> Stamp | None:
    """Stamp of a file, which changes when the file is rewritten; None if the file does not exist."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def read_drop(
    root: Path, params: IngestParams, classes: list[str], clock: Clock | None = None, group: str | None = None
) -> Drop:
    """List the images of a drop folder: a folder per class, or tables of paths or images with a label column.

    The class folder of a name in `classes` may be several levels deep. A table in the drop folder itself owns the
    images that it names; their folders are then not classes. Hidden files are skipped, and links out of the folder are
    not followed. Files that may still be being written are left for a later run: files changed in the last
    settle_seconds (a table together with all files that it names), and with require_marker all files without a
    `.complete` in their folder or in the drop folder. group: data.group.
    """
    root, clock = Path(os.path.normpath(root)), clock or Clock()
    drop = Drop(root)
    # Markers before files: a marker written while the files are listed belongs to the next batch and must remain.
    folders = [root, *(path for path in root.iterdir() if not path.name.startswith("."))]
    markers = _stamps(folder / MARKER for folder in folders if (folder / MARKER).is_file())
    files = _stamps(_list_files(root))
    waiting = _unsettled(files, params.settle_seconds, clock)
    if params.require_marker:
        waiting |= {path for path in files if not {root / MARKER, _top(root, path) / MARKER} & markers.keys()}
    tables = [path for path in files if path.parent == root and path.suffix.lower() in TABLE_SUFFIXES]
    claimed: set[Path] = set()
    for table in tables:
        if table not in waiting:
            rows, images = _table_rows(root, table, params, group)
            claimed |= images
            # Bounds memory with many small tables: a table that does not fit any more is read in the next run.
            full = drop.rows and (len(drop.rows) + len(rows)) * ROW_BYTES > params.max_table_mib * MIB
            if images & waiting or full:
                waiting |= images | {table}
            else:
                drop.rows += rows
                drop.files |= {path: files[path] for path in (table, *images) if path in files}
    class_names = set(classes)
    folders_of_tables = {_top(root, path) for path in claimed} - {root}
    for path in files.keys() - claimed - set(tables):
        if path in waiting or waiting & set(tables) or _top(root, path) in folders_of_tables:
            waiting.add(path)
        elif path.parent != root or has_image_suffix(path):
            drop.rows.append(_folder_row(root, path, class_names, group))
            drop.files[path] = files[path]
    used = {folder / MARKER for path in drop.files for folder in (root, _top(root, path))}
    drop.files |= {path: markers[path] for path in used & markers.keys()}
    drop.rows = [drop.rows[i] for i in reading_order([row.name for row in drop.rows])]
    drop.waiting = len(waiting & files.keys())
    return drop


def _list_files(root: Path) -> Iterator[Path]:
    skipped, links = 0, list[Path]()
    for folder, folders, names in os.walk(root):
        valid = [name for name in names if is_utf8(name)]
        skipped += len(names) - len(valid) + sum(not is_utf8(name) for name in folders)
        folders[:] = sorted(name for name in folders if not is_passed_over(Path(name)) and is_utf8(name))
        links += [Path(folder) / name for name in folders if (Path(folder) / name).is_symlink()]
        yield from (Path(folder) / name for name in sorted(valid) if not is_passed_over(Path(name)))
    for path in links:  # os.walk does not follow them
        print(f"ingest: {path}: skipped, because it {FOLDER_LINK}", file=sys.stderr)
    if skipped:
        print(f"ingest: {root}: {counted(skipped, 'name', 'are')} not UTF-8, skipped; rename them", file=sys.stderr)


def _stamps(paths: Iterable[Path]) -> dict[Path, Stamp]:
    return {path: stamp for path in paths if (stamp := stamp_of(path)) is not None}


def _unsettled(files: Iterable[Path], seconds: float, clock: Clock) -> set[Path]:
    """Files whose ctime is in the last `seconds` seconds; a copy that preserves mtime cannot change the ctime.

    If a ctime is in the future, because the clock was set back, the file's age is unknown: the function waits `seconds`
    and checks whether the ctime has changed.
    """
    now = clock.now()
    ages = {path: now - clock.ctime(path) for path in files} if seconds else {}
    young = {path for path, age in ages.items() if 0 <= age < seconds}
    future = {path: clock.ctime(path) for path, age in ages.items() if age < 0}
    if future:
        count = counted(len(future), "file", "are")
        print(f"ingest: {count} dated in the future (a clock was set back); waits {seconds:g} s", file=sys.stderr)
        clock.sleep(seconds)
        young |= {path for path, ctime in future.items() if clock.ctime(path) != ctime}
    return young


def _top(root: Path, path: Path) -> Path:
    """The folder in `root` that contains a file; `root` itself for a file beside the folders."""
    return root / path.relative_to(root).parts[0] if path.parent != root else root


def _inside(root: Path, path: Path) -> bool:
    try:
        return path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError):  # a link to itself, an invalid file name
        return False


def _problem(root: Path, path: Path) -> tuple[str, str] | None:
    """(kind, text) of the reason not to open a file; None if it is a regular file. Reading a pipe would block."""
    if not _inside(root, path):
        return "outside", "is a link that leads out of the drop folder, or to itself"
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        return "unreadable", f"{path}: {error.strerror}"
    return None if regular else ("unreadable", f"{path}: is not a regular file")


def _path_in_drop(root: Path, path: str) -> Path | None:
    """Path in the drop folder that a row of a table names; None if it is outside the folder."""
    if "\0" in path:
        return None
    relative = Path(os.path.relpath(root.absolute() / path, root.absolute()))
    return root / relative if relative.parts[:1] not in ((), ("..",)) and _inside(root, root / relative) else None


def _folder_row(root: Path, path: Path, class_names: set[str], group: str | None) -> DropRow:
    name = path.relative_to(root)
    read = partial(read_image_file, path)
    if len(name.parts) == 1:
        return DropRow(str(name), None, read, path, ("no label", "is beside the class folders"))
    parents = [class_key("/".join(name.parts[:depth])) for depth in range(1, len(name.parts))]
    label = next((parent for parent in parents if parent in class_names), parents[0])
    return DropRow(name.as_posix(), label, read, path, _problem(root, path), stored_group(group, name.as_posix()))


def _table_rows(root: Path, table: Path, params: IngestParams, group: str | None) -> tuple[list[DropRow], set[Path]]:
    """Rows of a table, and the files that it names. An unreadable table becomes one row with that problem."""
    columns = params.columns

    def unreadable(problem: tuple[str, str]) -> tuple[list[DropRow], set[Path]]:
        return [DropRow(table.name, None, partial(read_image_file, table), table, problem)], set()

    if problem := _problem(root, table):
        return unreadable(problem)
    limit = MemoryLimit(params.max_table_mib, "ingest.max_table_mib", ROW_BYTES)
    group_column = [group.removeprefix(COLUMN)] if group and group.startswith(COLUMN) else []
    try:
        shard = Shard(Storage(str(root)), table.name, [columns.label, columns.path, *group_column], limit)
        column = columns.image if columns.image in shard.names else columns.path
        shard.check_column(column)
        labels = shard.column(columns.label).to_pylist()
        paths = shard.column(column).to_pylist() if column == columns.path else [None] * len(labels)
        known = [shard.column(name).to_pylist() for name in group_column if name in shard.names]
    except DataError as error:
        return unreadable(("table", str(error)))
    images, as_text = RowGroupCache(column), table.suffix.lower() == ".csv"
    rows, files = [], set()
    for index, (label, path, cell) in enumerate(zip(labels, paths, *known or [[None] * len(labels)], strict=True)):
        file = _path_in_drop(root, path) if isinstance(path, str) else None
        problem = None
        if file is not None:
            problem = _problem(root, file)
            files.add(file)
        elif isinstance(path, str):
            problem = ("outside", f"names {path[:MAX_PATH]!r}, which is not inside the drop folder")
        read = partial(read_image_file, file) if file else partial(_cell, images, shard, index)
        name = f"{table.name}#{index}"
        of_group = stored_group(group, path if file else name, cell)
        rows.append(DropRow(name, _label(label, as_text), read, file, problem, of_group))
    return rows, files


def _label(value: object, as_text: bool) -> str | int | None:
    """The label as text or integer, None if it is neither. In CSV, which is text, `7` is a number and `007` a name."""
    if as_text and isinstance(value, str) and WHOLE_NUMBER.fullmatch(value):
        return int(value)
    return value if isinstance(value, str | int) and not isinstance(value, bool) else None


def _cell(images: RowGroupCache, shard: Shard, index: int) -> bytes:
    value = image_bytes(images.value(shard, index))
    if not isinstance(value, bytes):
        raise BadImageError(f"{shard.location}: row {index} holds {type(value).__name__}; expected encoded image bytes")
    return value
