"""File access for table sources: local folders and remote addresses of fsspec (s3://, gs:// and others)."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import fsspec
from fsspec.utils import get_protocol

from models.preprocess import MAX_BYTES
from pipeline.shared.errors import DataError, ParamsError
from pipeline.sources.source import BadImageError

GLOB = re.compile(r"[*?\[]")


def is_address(text: str) -> bool:
    """Whether a text is a remote address (`s3://bucket/key`) and not a path."""
    return "://" in text


class Storage:
    """Files under one root, a local folder or an address that fsspec supports. Names are relative to the root.

    Raises ParamsError if the package of an address is not installed, DataError with the file if it cannot be read.
    """

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/") or "/"
        try:
            self._files, self._base = fsspec.url_to_fs(self.root)
        except (ImportError, ValueError) as error:
            raise ParamsError(f"data.location is {redact_url(root)!r}: {_reason(error)}") from None

    @property
    def is_local(self) -> bool:
        """Whether the files are on this machine."""
        return get_protocol(self.root) == "file"

    def location(self, name: str) -> str:
        """Location of a file, for messages; without the password or signature of an address."""
        return redact_url(f"{self.root}/{name}")

    def expand(self, names: str | list[str]) -> list[str]:
        """List the table files of a params value: a file, a glob pattern, a folder of shards, or a list of these.

        Sorted by name within a pattern or folder, so that row numbers are stable. Raises DataError if nothing matches.
        """
        files: list[str] = []
        for name in [names] if isinstance(names, str) else names:
            with self._as_data_error(name):
                if GLOB.search(name):
                    matches = sorted(self._files.glob(self._path(name)))
                elif self._files.isdir(self._path(name)):
                    matches = sorted(self._files.glob(f"{self._path(name)}/*.parquet"))
                else:
                    matches = [self._path(name)]
            if not matches:
                raise DataError(f"{self.location(name)}: holds no .parquet file; set data.table to the shards")
            files += [match.removeprefix(f"{self._base.rstrip('/')}/") for match in matches]
        return files

    def open(self, name: str) -> Any:
        """Open a file for reading bytes."""
        with self._as_data_error(name):
            return self._files.open(self._path(name), "rb")

    def size(self, name: str) -> int | None:
        """Size of a file in bytes; None if the server does not report it."""
        with self._as_data_error(name):
            return self._files.size(self._path(name))

    def read(self, name: str) -> bytes:
        """Read an image file of at most MAX_BYTES. Raises BadImageError if it is missing or larger."""
        with self._as_data_error(name):
            try:
                size = self._files.size(self._path(name))
            except FileNotFoundError:
                raise BadImageError(f"{self.location(name)}: No such file or directory") from None
            if size is None:  # the server does not report the size
                with self._files.open(self._path(name), "rb") as stream:
                    data = stream.read(MAX_BYTES + 1)
                size = len(data)
            elif size <= MAX_BYTES:
                data = self._files.cat_file(self._path(name))
            if size > MAX_BYTES:
                raise BadImageError(f"{self.location(name)}: has {size} bytes, above the limit of {MAX_BYTES}")
            return data

    def stamp(self, name: str) -> str | None:
        """Text that changes when the file changes; None if the file is missing."""
        with self._as_data_error(name):
            try:
                info = self._files.info(self._path(name))
            except FileNotFoundError:
                return None
            keys = ("ETag", "etag", "mtime", "created", "LastModified")
            return f"{info.get('size')}-{next((info[key] for key in keys if key in info), '')}"

    def _path(self, name: str) -> str:
        return name if name.startswith("/") else f"{self._base.rstrip('/')}/{name}"

    @contextlib.contextmanager
    def _as_data_error(self, name: str) -> Iterator[None]:
        """Convert the errors of fsspec's back ends to a DataError of one line with the file."""
        try:
            yield
        except DataError:
            raise
        except FileNotFoundError:
            raise DataError(f"{self.location(name)}: no such file; set data.location or data.table to it") from None
        except Exception as error:
            if self.is_local and isinstance(error, OSError):
                raise BadImageError(f"{self.location(name)}: {error.strerror or error}") from None
            raise DataError(f"{self.location(name)}: {_reason(error)}{_advice(error)}") from None


def redact_url(address: str) -> str:
    """Redact an address for a message or log: removes user, password and query (signatures)."""
    if not is_address(address):
        return address
    return re.sub(r"\?\S*=\S*", "?…", re.sub(r"(://)[^/@\s]*@", r"\1…@", address))


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return redact_url(text) if is_address(text) else text


def _advice(error: Exception) -> str:
    # Compared by name, because the packages of the back ends (botocore, google-auth) may not be installed.
    if {kind.__name__ for kind in type(error).__mro__} & {
        "NoCredentialsError",
        "PartialCredentialsError",
        "DefaultCredentialsError",
        "PermissionError",
    }:
        return "; give this machine credentials that may read it (environment, profile or role), as for `dvc pull`"
    return ""
