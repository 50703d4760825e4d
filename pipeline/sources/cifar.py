"""Sources `cifar10` and `cifar100`: read the archives that torchvision downloads, with a restricted unpickler."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
import zlib
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pipeline.shared.errors import DataError, ParamsError
from pipeline.sources.source import Row, Source, as_png

NAMES = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}
MAX_MEMBER = 256 * 1024 * 1024  # bytes; the largest file of either archive has 155 million
# What pickle raises for damaged content.
UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    OverflowError,
)
LABELS = {"cifar10": b"labels", "cifar100": b"fine_labels"}


class CifarSource(Source):
    """CIFAR-10 or CIFAR-100, python version: folder or .tar.gz under data.location; each file's md5 is checked.

    50,000 training and 10,000 test images of 32x32 pixels, in the order of the batches, on which the CIFAR-LT subset
    depends. Names and md5 sums of the files are torchvision's. Raises ParamsError if there is no archive, DataError if
    a file is not the published one.
    """

    def __init__(self, name: str, root: Path, download: bool) -> None:
        self.origin = name
        archive = _Archive(name, root, download)
        names = archive.load(archive.published.meta["filename"], archive.published.meta["md5"])
        self.classes = [text.decode() for text in names[archive.published.meta["key"].encode()]]
        self._pixels: dict[str, np.ndarray] = {}
        self.rows = []
        for split, files in (("train", archive.published.train_list), ("test", archive.published.test_list)):
            pixels, labels = archive.batches(files, len(self.classes))
            self._pixels[split] = pixels
            self.rows += [Row(f"{split}#{i}", label, f"{name}/{split}#{i}", split) for i, label in enumerate(labels)]

    def read(self, reference: str) -> bytes:
        """Encode the image as PNG, pixels unchanged."""
        split, _, index = reference.partition("#")
        return as_png(self._pixels[split][int(index)])


class _Archive:
    """Reads the files of one archive, from its folder or directly from the .tar.gz."""

    def __init__(self, name: str, root: Path, download: bool) -> None:
        from torchvision import datasets  # slow import that other sources do not need

        self._name, self._root = name, root
        self.published = getattr(datasets, NAMES[name])
        folder, packed = root / self.published.base_folder, root / self.published.filename
        if download and not folder.is_dir() and not packed.is_file():
            self._download()
        if not folder.is_dir() and not packed.is_file():
            raise ParamsError(
                f"data.location is {str(root)!r}, which holds neither {folder.name}/ nor {packed.name}; put the archive "
                "there (python version), or set data.download: true"
            )
        self._folder, self._packed = folder, None if folder.is_dir() else packed
        self._members: dict[str, bytes] | None = None

    def _download(self) -> None:
        try:
            self.published(root=self._root, train=True, download=True)
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"{self.published.url}: not downloaded ({reason}); fetch it by other means and put it into {self._root}"
            ) from None

    def batches(self, files: list[list[str]], classes: int) -> tuple[np.ndarray, list[int]]:
        """Read pixels uint8 [N,32,32,3] and N labels from batch files, in order."""
        pixels: list[np.ndarray] = []
        labels: list[int] = []
        for file, md5 in files:
            batch = self.load(file, md5)
            try:
                planes = np.asarray(batch[b"data"], dtype=np.uint8).reshape(-1, 3, 32, 32)
                numbers = [int(label) for label in batch[LABELS[self._name]]]
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{self._location(file)}: is not a batch of {self._name}: {error}") from None
            if len(planes) != len(numbers) or not all(0 <= label < classes for label in numbers):
                raise DataError(f"{self._location(file)}: its labels do not match its images; fetch the archive again")
            pixels.append(planes.transpose(0, 2, 3, 1))
            labels += numbers
        return np.concatenate(pixels), labels

    def load(self, file: str, md5: str) -> Any:
        """Check the md5 of one file and unpickle it. Raises DataError with the file."""
        data = self._bytes(file)
        digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
        if digest != md5:
            raise DataError(
                f"{self._location(file)}: has md5 {digest}, the published file has {md5}; it is damaged or another version; "
                "remove it and fetch the archive again"
            )
        return unpickle_arrays(data, self._location(file))

    def _bytes(self, file: str) -> bytes:
        try:
            if self._packed is None:
                if (size := (self._folder / file).stat().st_size) > MAX_MEMBER:
                    raise DataError(f"{self._location(file)}: has {size} bytes, above the limit of {MAX_MEMBER}")
                return (self._folder / file).read_bytes()
            if self._members is None:
                self._members = self._read_members(self._packed)
            return self._members[f"{self._folder.name}/{file}"]
        except KeyError:
            raise DataError(f"{self._location(file)}: no such file in the archive; fetch it again") from None
        except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise DataError(f"{self._location(file)}: not readable ({reason}); fetch the archive again") from None

    def _read_members(self, packed: Path) -> dict[str, bytes]:
        # One pass, because a .tar.gz has no index and each look-up would decompress it from the start. Only the
        # published files are kept, so that other files take no memory.
        published = [file for file, _ in self.published.train_list + self.published.test_list]
        names = {f"{self._folder.name}/{file}" for file in (self.published.meta["filename"], *published)}
        members: dict[str, bytes] = {}
        with tarfile.open(packed, "r|gz") as archive:
            for member in archive:
                if member.name in names - members.keys() and member.isreg() and member.size <= MAX_MEMBER:
                    members[member.name] = archive.extractfile(member).read()
                if len(members) == len(names):
                    break
        return members

    def _location(self, file: str) -> str:
        return str(self._folder / file) if self._packed is None else f"{self._packed}: {self._folder.name}/{file}"


class _ArraysOnly(pickle.Unpickler):
    """Restricted unpickler: allows arrays, text, numbers, lists and dicts only."""

    ALLOWED: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Allow only the parts of a plain numpy array; other classes could run code. Raises UnpicklingError."""
        try:
            return self.ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it contains {module}.{name}, which is not an array") from None


def unpickle_arrays(data: bytes, location: str) -> Any:
    """Unpickle plain data and numpy arrays; Python 2 strings become bytes. Raises DataError for other content."""
    try:
        return _ArraysOnly(io.BytesIO(data), encoding="bytes").load()
    except UNPICKLING_ERRORS as error:
        raise DataError(f"{location}: not unpickled: {' '.join(str(error).split())}") from None
