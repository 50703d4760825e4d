"""Parse the prior argument of a request: named prior, strength, or target prior as vector, mapping or file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.prior import Floats, check_numbers, check_target_prior, class_key, parse_number
from serving.shared.errors import InputError

Prior = str | float | Path | Sequence[float] | NDArray[Any] | Mapping[str, float] | None

NAMED = {"balanced": 0.0, "train": 1.0}
LIVE = "live"  # the estimate of `tailor drift --write`; its numbers are stored on the server
MAX_FILE_BYTES = 16 * 1024 * 1024
LARGEST = float(np.finfo(np.float32).max)
EXPECTED = "expected balanced, train, live, a number, or a file with one number per class"


def parse_prior(prior: Prior) -> float | Floats | dict[str, float] | str | None:
    """Parse a prior into a strength (float), a target prior (vector [C] or by class name), LIVE, or None (the default).

    prior: `balanced` (strength 0), `train` (1), `live` (the estimate of `tailor drift --write`), a number or its text,
    a vector, a mapping from class name to probability, or a file with a JSON list, a JSON object by class name, or one
    number per line. None is the server's default. `vector_of` checks a vector against the number of classes.
    Raises InputError.
    """
    if prior is None:
        return None
    if isinstance(prior, bool | np.bool_):
        raise InputError(f"prior is {prior}; {EXPECTED}")
    if isinstance(prior, int | float | np.number):
        return _strength(prior)
    if isinstance(prior, Mapping):
        return _by_name(prior, "prior")
    if isinstance(prior, np.ndarray | Sequence) and not isinstance(prior, str):
        return _vector(prior, "prior")
    if isinstance(prior, str):
        if prior in NAMED:
            return NAMED[prior]
        if prior == LIVE:
            return LIVE
        try:
            return _strength(parse_number(prior))
        except ValueError:
            pass
    return _read_file(Path(prior))


def vector_of(parsed: Floats | Mapping[str, float], names: Sequence[str] | None, classes: int) -> Floats:
    """Return the target prior, float64 [C], checked against the server's classes. Only a mapping needs `names`.

    Classes missing from a mapping get 0. Raises InputError naming the unknown class or the invalid number.
    """
    if isinstance(parsed, Mapping):
        indexes = {class_key(name): index for index, name in enumerate(names or ())}
        vector = np.zeros(classes)
        for name, probability in parsed.items():
            if class_key(name) not in indexes:
                first = ", ".join(list(indexes)[:5])
                raise InputError(f"prior names class {name!r}, which the server does not have; it has {first}, …")
            vector[indexes[class_key(name)]] = probability
    else:
        vector = parsed
    try:
        return check_target_prior(vector, classes)
    except ValueError as error:
        raise InputError(f"prior: {error}") from None


def as_text(parsed: float | str | Floats) -> bytes:
    """Encode a prior for the server's input `prior`: a name, a number, or a JSON list with one number per class."""
    if isinstance(parsed, str):
        return parsed.encode()
    return json.dumps(parsed.tolist() if isinstance(parsed, np.ndarray) else parsed).encode()


def _strength(number: float | np.number[Any]) -> float:
    try:
        value = float(number)
    except OverflowError:  # an integer of hundreds of digits
        value = math.inf
    if not math.isfinite(value) or abs(value) > LARGEST:
        raise InputError(f"prior is {value:g}; as a strength, expected a finite number")
    return value


def _vector(values: object, source: str) -> Floats:
    vector = _numbers(values, source)
    if vector.ndim != 1 or vector.size == 0:
        raise InputError(f"{source}: has shape {list(vector.shape)}; expected one number per class")
    try:
        return check_target_prior(vector, len(vector))
    except ValueError as error:
        raise InputError(f"{source}: {error}") from None


def _numbers(values: object, source: str) -> Floats:
    try:
        return check_numbers(values)
    except (TypeError, ValueError):
        raise InputError(f"{source}: holds a value that is not a number; expected one number per class") from None
    except OverflowError:
        raise InputError(f"{source}: holds a number too large for a float; expected numbers that sum to 1") from None


def _by_name(values: Mapping[str, object], source: str) -> dict[str, float]:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{source}: class {name!r} has {value!r}; expected a number")
    if len({class_key(str(name)) for name in values}) < len(values):
        raise InputError(f"{source}: names a class twice, in two Unicode forms (NFC, NFD)")
    numbers = _numbers(list(values.values()), source)
    _vector(numbers, source)
    return {str(name): float(number) for name, number in zip(values, numbers, strict=True)}


def _read_file(path: Path) -> Floats | dict[str, float]:
    try:
        if not path.is_file():
            raise InputError(
                f"prior is {str(path)!r}, {'no file' if path.exists() else 'and no such file exists'}; {EXPECTED}"
            )
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(f"{path}: is larger than {MAX_FILE_BYTES} bytes; {EXPECTED}")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; {EXPECTED}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not text; {EXPECTED}") from None
    if text.lstrip()[:1] not in ("[", "{"):
        return _vector(_lines(text, path), str(path))
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also covers an integer of thousands of digits
        raise InputError(f"{path}: is not JSON: {error}; {EXPECTED}") from None
    return _by_name(content, str(path)) if isinstance(content, dict) else _vector(content, str(path))


def _lines(text: str, path: Path) -> list[float]:
    numbers = []
    for number, line in enumerate(map(str.strip, text.splitlines()), start=1):
        try:
            numbers += [parse_number(line)] if line else []
        except ValueError:
            raise InputError(f"{path}: line {number} is {line[:40]!r}; expected a number") from None
    return numbers
