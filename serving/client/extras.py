"""Extra parts of an answer that a request wants: prediction set, decision, node of a taxonomy; and their form as inputs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.decisions import check_costs
from models.prior import check_numbers, class_key
from serving.shared.errors import InputError

Costs = Mapping[str, float] | Sequence[float] | Sequence[Sequence[float]] | NDArray[Any]
MAX_FILE_BYTES = 16 * 1024 * 1024
PACKED = "extras"  # output of a current release with the values of all outputs below except EXPLAIN, as JSON
DECISION = ("decision", "decision_index", "expected_cost")
NODE = ("node", "node_probability")
# A release may lack each of them.
EXPLAIN = ("nearest", "nearest_class", "nearest_cosine", "nearest_image", "activation_map", "activation_crop")
NEAREST, MOST_NEAREST = 5, 20  # training images of explain=True, and the most


@dataclass(frozen=True)
class Extras:
    """Extra parts of the answers of one call; a part that is None is the default of the release.

    coverage: above 0 and below 1; the answer has the set of classes that contains the right one with this probability.
    costs: the answer has the class of least expected cost. A mapping from class name, or a sequence with one number per
    class, is the cost of missing that class; a class left out of a mapping costs 1. A matrix [C,C] has a row for each true
    class and a column for each answer. ask: price of asking a person, in the unit of costs; the decision is to ask where
    every class costs more. Without costs every wrong class costs 1. false_alarms: above 0 and below 1; the answer has whether
    the image is unknown, which it wrongly is for this share of images of the known classes. level: above 0, at most 1; the
    answer has the deepest node of the taxonomy whose classes together have this probability. explain: True, or the number of
    nearest training images, at most 20; the answer has them and, for some networks, the class-activation map of its best class.
    Raises InputError.
    """

    coverage: float | None = None
    costs: Costs | None = None
    ask: float | None = None
    false_alarms: float | None = None
    level: float | None = None
    explain: bool | int | None = None

    def __post_init__(self) -> None:
        if self.coverage is not None and not 0 < _number(self.coverage, "coverage") < 1:
            raise InputError(f"coverage is {self.coverage:g}; expected a number above 0 and below 1")
        if self.false_alarms is not None and not 0 < _number(self.false_alarms, "false_alarms") < 1:
            raise InputError(f"false_alarms is {self.false_alarms:g}; expected a number above 0 and below 1")
        if self.ask is not None and not 0 <= _number(self.ask, "ask") < math.inf:
            raise InputError(f"ask is {self.ask:g}; expected a finite price of at least 0")
        if self.level is not None and not 0 < _number(self.level, "level") <= 1:
            raise InputError(f"level is {self.level:g}; expected a number above 0 and at most 1")
        if not isinstance(self.explain, int | None) or not 0 <= (self.explain or 0) <= MOST_NEAREST:
            raise InputError(
                f"explain is {self.explain!r}; expected True or a number of images from 1 to {MOST_NEAREST}"
            )

    @property
    def names_needed(self) -> bool:
        """Whether the class names of the server are needed for the costs."""
        return isinstance(self.costs, Mapping)

    def inputs(self, names: Sequence[str] | None) -> dict[str, NDArray[Any]]:
        """One row of each input of `classifier`. names: of the server's classes; only for a mapping. Raises InputError."""
        rows: dict[str, NDArray[Any]] = {}
        if self.coverage is not None:
            rows["coverage"] = np.array([self.coverage], dtype=np.float32)
        if self.costs is not None:
            rows["costs"] = np.array([json.dumps(self._costs(names)).encode()], dtype=np.object_)
        if self.ask is not None:
            rows["ask"] = np.array([self.ask], dtype=np.float32)
        if self.false_alarms is not None:
            rows["false_alarms"] = np.array([self.false_alarms], dtype=np.float32)
        if self.level is not None:
            rows["level"] = np.array([self.level], dtype=np.float32)
        if self.explain:
            rows["explain"] = np.array([NEAREST if self.explain is True else self.explain], dtype=np.uint8)
        return rows

    def _costs(self, names: Sequence[str] | None) -> Any:
        costs = self.costs
        if isinstance(costs, Mapping):
            indexes = {class_key(name): index for index, name in enumerate(names or ())}
            row = [1.0] * len(indexes)
            for name, cost in costs.items():
                if isinstance(cost, bool) or not isinstance(cost, int | float):
                    raise InputError(f"costs: class {name!r} has {cost!r}; expected a number")
                if class_key(name) not in indexes:
                    raise InputError(f"costs name class {name!r}, which the server does not have")
                row[indexes[class_key(name)]] = cost
            costs = row
        try:
            numbers = check_numbers(costs)
            checked = check_costs(numbers, len(numbers) if numbers.ndim else 0)
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"costs: {str(error).removeprefix('costs ')}") from None
        return checked.tolist()


def outputs_of(inputs: Mapping[str, Any]) -> dict[str, int]:
    """The outputs to request for these inputs of extras, as in messages.Infer; without those that a response may lack."""
    names = ["set", "set_size"] if "coverage" in inputs else []
    if "costs" in inputs or "ask" in inputs:
        names += DECISION
    if "false_alarms" in inputs:
        names += ["unknown", "typicality"]
    if "level" in inputs:
        names += NODE
    return dict.fromkeys(names, 0)


def row_bytes(*rows: NDArray[Any] | None) -> int:
    """Bytes that these rows of inputs add to each image of a request; a matrix of costs can have megabytes."""
    return sum(len(row[0]) if row.dtype == object else row.nbytes for row in rows if row is not None)


def read_costs(path: Path) -> Costs:
    """Read costs from a JSON file: an object by class name, a list, or a list of lists. Raises InputError naming the file."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(f"{path}: is larger than {MAX_FILE_BYTES} bytes; expected JSON with costs")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a JSON file with costs") from None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict | list):
        raise InputError(f"{path}: is no JSON list or object; expected costs by class name, or one number per class")
    return content


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise InputError(f"{name} is {value!r}; expected a number")
    return float(value)
