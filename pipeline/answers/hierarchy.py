"""Accuracy by a taxonomy: how often the answer's node contains the right class, by wanted probability and shot group."""

from __future__ import annotations

from typing import Any

import numpy as np

from models.prior import GROUPS, softmax
from models.taxonomy import Taxonomy
from pipeline.data.class_prior import Prior
from pipeline.evaluation.metrics import mean_of

LEVELS = (0.5, 0.7, 0.8, 0.9, 0.95)


def taxonomy_record(
    taxonomy: Taxonomy | None, logits: np.ndarray, labels: np.ndarray, prior: Prior
) -> dict[str, Any] | None:
    """Hierarchical accuracy on the test split under the balanced prior, as JSON; None without a taxonomy.

    logits: calibrated and balanced, [N,C]. labels: [N]. Every value is the mean over classes (of a shot group). `classes`,
    `parents`, `roots`: the most probable class is right, has the parent of the right one, has its root. `levels`: of each
    wanted probability, `correct`: the node contains the right class; `at_class`: the share that is answered with a class;
    `size`: the number of classes of the node.
    """
    if taxonomy is None:
        return None
    probabilities = softmax(logits)
    paths = [taxonomy.path(label) for label in range(taxonomy.classes)]
    parent, root = (np.array([path[min(index, len(path) - 1)] for path in paths]) for index in (1, len(taxonomy.names)))
    predicted, sizes = probabilities.argmax(1), np.append(taxonomy.class_counts(), taxonomy.classes)
    record = {
        "nodes": len(taxonomy.names) - taxonomy.classes,
        "classes": _by_group(predicted == labels, labels, prior),
        "parents": _by_group(parent[predicted] == parent[labels], labels, prior),
        "roots": _by_group(root[predicted] == root[labels], labels, prior),
        "levels": [],
    }
    for level in LEVELS:
        nodes = np.array([answer.node for answer in taxonomy.answers(probabilities, level)])
        right = np.array([node == -1 or node in paths[label] for node, label in zip(nodes, labels, strict=True)])
        at_class = (nodes >= 0) & (nodes < taxonomy.classes)
        record["levels"].append(
            {
                "level": level,
                "correct": _by_group(right, labels, prior),
                "at_class": _by_group(at_class, labels, prior),
                "size": _by_group(sizes[nodes], labels, prior),  # index -1 is the last entry, all classes
            }
        )
    return record


def _by_group(values: np.ndarray, labels: np.ndarray, prior: Prior) -> dict[str, float | None]:
    """Mean over the classes of the mean over a class's images, for all classes and for each shot group."""
    classes = len(prior.classes)
    counts = np.bincount(labels, minlength=classes)
    sums = np.bincount(labels, values.astype(float), minlength=classes)
    means = [float(total / count) if count else None for total, count in zip(sums, counts, strict=True)]
    groups = {"all": list(range(classes))} | {g: [c for c in range(classes) if prior.groups[c] == g] for g in GROUPS}
    return {name: mean_of([means[c] for c in members]) for name, members in groups.items()}
