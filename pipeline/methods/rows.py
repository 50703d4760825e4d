"""Rows of the table of a comparison: accuracy, paired differences, calibration and cost of each method."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace

import numpy as np

from pipeline.evaluation.intervals import Estimate
from pipeline.methods.catalogue import Method
from pipeline.methods.comparison import Comparison, Run
from pipeline.methods.cost import Cost, Served
from pipeline.methods.estimates import accuracy_estimate, class_weights, estimate, seed_values


@dataclass(frozen=True)
class Row:
    """A method in the table.

    epochs: of the student. accuracy: measure (all, many, medium, few) → estimate; by_seed: measure → value of each seed, only
    measures with test images. difference: as accuracy, against the reference over the seeds of both; empty for the reference.
    behind: of all classes, against the method with the highest accuracy, which has None. ece: mean over seeds, and their
    standard deviation or None. seconds, cost: of one seed, with the teacher.
    """

    method: Method
    seeds: list[int]
    epochs: int
    accuracy: dict[str, Estimate]
    by_seed: dict[str, list[float]]
    difference: dict[str, Estimate]
    behind: Estimate | None
    ece: float
    ece_std: float | None
    seconds: float
    cost: Cost | None
    served: Served


def rows_of(comparison: Comparison, reference: str, equal: bool = False) -> list[Row]:
    """Rows of the methods that have a run, in order. reference: name of the method that the differences are against.

    equal: the runs at equal cost instead of those at equal epochs.
    """
    results = comparison.equal if equal else comparison.runs
    against = results.get(reference)
    rows = [
        summarise(comparison, method, runs, None if method.name == reference else against)
        for method in comparison.methods
        if (runs := results.get(method.name))
    ]
    first = max(rows, key=lambda row: row.accuracy["all"].value or 0.0, default=None)
    return [
        row
        if first is None or row is first
        else replace(row, behind=_paired(comparison, results[row.method.name], results[first.method.name]).get("all"))
        for row in rows
    ]


def summarise(comparison: Comparison, method: Method, runs: list[Run], against: list[Run] | None) -> Row:
    """Row of a method from its runs. against: runs of the reference; None for no differences."""
    labels, weights = comparison.project.labels, _weights(comparison)
    correct = np.stack([(run.predicted == labels).astype(float) for run in runs])
    errors, networks = [run.ece for run in runs], runs[0].networks
    costs = [network.cost for network in networks]
    return Row(
        method, [run.seed for run in runs], runs[0].epochs,
        {name: accuracy_estimate(correct, labels, share) for name, share in weights.items()},
        {name: seed_values(correct, labels, share).tolist() for name, share in weights.items() if share.any()},
        _paired(comparison, runs, against or []), None, statistics.fmean(errors),
        statistics.stdev(errors) if len(errors) > 1 else None,
        statistics.fmean(sum(network.seconds for network in run.networks) for run in runs),
        None if None in costs else sum((cost for cost in costs if cost), Cost(0, 0, 0)),
        networks[-1].served,
    )  # fmt: skip


def _paired(comparison: Comparison, runs: list[Run], against: list[Run]) -> dict[str, Estimate]:
    """Differences of the accuracies on the same test images, over the seeds of both; empty without a common seed."""
    labels, others = (
        comparison.project.labels,
        {run.seed: run.predicted == comparison.project.labels for run in against},
    )
    paired = [(run.predicted == labels) - others[run.seed].astype(float) for run in runs if run.seed in others]
    if not paired:
        return {}
    return {name: estimate(np.stack(paired), labels, share) for name, share in _weights(comparison).items()}


def _weights(comparison: Comparison) -> dict[str, np.ndarray]:
    groups = comparison.project.prior.groups
    return class_weights(groups, np.bincount(comparison.project.labels, minlength=len(groups)))
