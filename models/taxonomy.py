"""Taxonomy of the classes: read it, check it, and answer at the deepest node that is probable enough.

numpy only: the server runs a copy of this file.
"""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

COLUMNS = ("name", "parent")
MAX_NODES = 100_000
MAX_LEVELS = 100  # from a node to its root; time and memory grow with it
ROUNDING = 1e-9  # of a sum of probabilities


class Node(NamedTuple):  # not a dataclass, which the inference process could not define: its module has no entry in sys
    """An answer: index of the node, -1 where no node is probable enough, and its summed probability."""

    node: int
    probability: float


class Taxonomy:
    """Nodes of a forest whose leaves are the classes. names: the C classes in their order, then the inner nodes.

    parents: index of the parent of each node, -1 for none. Raises ValueError for a cycle, more than MAX_LEVELS levels, an index
    outside the nodes, and a class that is the parent of another node.
    """

    def __init__(self, names: Sequence[str], parents: Sequence[int], classes: int) -> None:
        self.names, self.parents, self.classes = list(names), list(parents), classes
        if len(names) != len(parents) or not 0 < classes <= len(names):
            raise ValueError(f"taxonomy has {len(names)} names and {len(parents)} parents for {classes} classes")
        if wrong := [parent for parent in parents if not (parent == -1 or classes <= parent < len(names))]:
            raise ValueError(f"taxonomy has the parent {wrong[0]}; expected -1 or {classes} to {len(names) - 1}")
        self.depth = np.zeros(len(names), dtype=np.int64)
        pairs = []
        for node in range(len(names)):
            path = self.path(node)
            self.depth[node] = len(path)
            if node < classes:
                pairs += [(ancestor, node) for ancestor in path]
        self._node, self._class = np.array(pairs, dtype=np.int64).T

    def path(self, node: int) -> list[int]:
        """The node and its ancestors, the node first. Raises ValueError for a cycle, and for more than MAX_LEVELS nodes."""
        path: list[int] = []
        while node != -1:
            if node in path:
                raise ValueError(f"taxonomy has a cycle through {self.names[node]!r}")
            if len(path) == MAX_LEVELS:
                raise ValueError(f"taxonomy has more than {MAX_LEVELS} levels above {self.names[path[0]]!r}")
            path.append(node)
            node = self.parents[node]
        return path

    def sums(self, probabilities: NDArray[Any]) -> NDArray[np.float64]:
        """Summed probability of the classes below each node: [N,C] → float64 [N,nodes]."""
        result = np.zeros((len(self.names), len(probabilities)))
        np.add.at(result, self._node, np.asarray(probabilities, dtype=np.float64).T[self._class])
        return result.T

    def answers(self, probabilities: NDArray[Any], level: float | NDArray[Any]) -> list[Node]:
        """The deepest node of each row whose summed probability reaches `level`; of equally deep ones the most probable.

        probabilities: [N,C]. level: above 0, at most 1; a number, or one per row. Above 0.5 the nodes that reach it are on
        one path. Index -1 with probability 1 where none does, which a forest with several roots allows.
        """
        sums = self.sums(probabilities)
        reached = sums >= np.broadcast_to(np.asarray(level, dtype=np.float64), len(sums))[:, None] - ROUNDING
        best = np.where(reached, self.depth + np.minimum(sums, 1) / 2, -1.0).argmax(axis=1)
        rows = np.arange(len(sums))
        return [
            Node(int(node), float(min(sums[row, node], 1.0))) if reached[row, node] else Node(-1, 1.0)
            for row, node in zip(rows, best, strict=True)
        ]

    def contains(self, node: int, label: int) -> bool:
        """Whether a class is the node or below it; -1 contains every class."""
        return node == -1 or node in self.path(label)

    def class_counts(self) -> NDArray[np.int64]:
        """Number of classes of each node, int [nodes]."""
        return np.bincount(self._node, minlength=len(self.names))


def read_taxonomy(text: str, classes: Sequence[str]) -> Taxonomy:
    """Read classes.csv with the columns name and parent; an empty parent is a root, and unlisted parents are roots.

    Names are compared in Unicode's composed form. Raises ValueError for other columns, a class that is missing or has no
    row, a node with two parents, a class that is a parent, a cycle, and more than MAX_NODES nodes.
    """
    reader = csv.DictReader(text.splitlines())
    rows = list(reader)
    if repeated := [name for name in COLUMNS if (reader.fieldnames or []).count(name) > 1]:
        raise ValueError(f"has more than one column {repeated[0]!r}; rename all but one")
    if not rows or not set(COLUMNS) <= set(rows[0]):
        found = ", ".join(map(str, rows[0])) if rows else "no row"
        raise ValueError(f"has {found}; expected the columns {' and '.join(COLUMNS)}")
    parent_of: dict[str, str] = {}
    for number, row in enumerate(rows, start=2):
        name, parent = (unicodedata.normalize("NFC", (row[column] or "").strip()) for column in COLUMNS)
        if not name:
            raise ValueError(f"line {number} has no name")
        if parent_of.setdefault(name, parent) != parent:
            raise ValueError(f"line {number}: {name!r} has two parents, {parent_of[name]!r} and {parent!r}")
    if missing := [name for name in classes if name not in parent_of]:
        more = f" ({len(missing)} such classes)" if len(missing) > 1 else ""
        raise ValueError(f"class {missing[0]!r} is missing{more}; add a row for it, with or without a parent")
    inner = dict.fromkeys([*parent_of, *filter(None, parent_of.values())])
    known = set(classes)
    if wrong := sorted(known & set(parent_of.values())):
        raise ValueError(f"class {wrong[0]!r} is the parent of another node; expected classes without children")
    names = [*classes, *(name for name in inner if name not in known)]
    if len(names) > MAX_NODES:
        raise ValueError(f"has {len(names)} nodes; expected at most {MAX_NODES}")
    number_of = {name: index for index, name in enumerate(names)}
    parents = [number_of[parent_of[name]] if parent_of.get(name) else -1 for name in names]
    taxonomy = Taxonomy(names, parents, len(classes))
    empty = [name for name, count in zip(names, taxonomy.class_counts(), strict=True) if not count]
    if empty:
        raise ValueError(f"{empty[0]!r} has no class below it; remove its row, or correct the spelling of a class")
    return taxonomy
