"""Train methods on the project's data set with its recipe, within a budget of time, and compare their predictions."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from pipeline.data.class_prior import Prior, load_prior
from pipeline.data.split_tables import read_split
from pipeline.evaluation.intervals import Estimate
from pipeline.features.stored import stored_encoder
from pipeline.methods.catalogue import Method, params_of
from pipeline.methods.cost import Cost, Served, training_cost
from pipeline.methods.estimates import class_weights, clipped, estimate
from pipeline.methods.networks import (
    RECORD,
    Network,
    Trained,
    network_of,
    predictions,
    read_record,
    train_network,
)
from pipeline.params import Params
from pipeline.second_stage.refit import check_classes
from pipeline.shared.artifacts import EMBEDDINGS_INDEX, PRIOR, SPLIT, TEXT, sha256_of, sha256_of_json
from pipeline.shared.errors import DataError, ParamsError, StageError
from pipeline.text.stored import FEATURES_FILE
from pipeline.training.run import check_recipe
from pipeline.training.state import check_batch
from serving.shared.terminal import counted

NETWORKS = "networks"
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Project:
    """What all methods share: params, prior, labels int64 [N] of the test split, and the hash of the data."""

    params: Params
    prior: Prior
    labels: np.ndarray
    data: str


@dataclass(frozen=True)
class Run:
    """A finished run of a method: its seed, predicted classes int [N], calibration error, records of its networks."""

    seed: int
    predicted: np.ndarray
    ece: float
    networks: list[Trained]


@dataclass(frozen=True)
class Missing:
    """A run that has no result, and why. seed: None for a method that does not apply to the project."""

    method: str
    seed: int | None
    reason: str


@dataclass
class Comparison:
    """Runs by method, in the order of the methods, the runs that are missing, and the methods that do not apply."""

    project: Project
    methods: list[Method]
    seeds: list[int]
    runs: dict[str, list[Run]] = field(default_factory=dict)
    missing: list[Missing] = field(default_factory=list)
    left_out: list[Missing] = field(default_factory=list)
    failed: bool = False


@dataclass(frozen=True)
class Row:
    """A method in the table.

    accuracy: measure (all, many, medium, few) → estimate. difference: the same against the reference, over the seeds of
    both; empty for the reference. ece: mean over seeds, and their standard deviation or None. seconds, cost: of one seed,
    with the teacher.
    """

    method: Method
    seeds: list[int]
    accuracy: dict[str, Estimate]
    difference: dict[str, Estimate]
    ece: float
    ece_std: float | None
    seconds: float
    cost: Cost | None
    served: Served


def load_project(params: Params) -> Project:
    """Read prior, test labels and hashes of the project in the working folder.

    Raises ParamsError if a stage before the training has not run, DataError if the test split is empty.
    """
    files = [*(SPLIT / f"{name}.parquet" for name in SPLITS), PRIOR]
    for path in files:
        if not path.is_file():
            raise ParamsError(f"{path}: no such file; run `dvc repro {'embed' if params.encoder else 'prior'}` first")
    stored_encoder(params)  # raises if the features are missing or of other params
    labels = read_split("test", ["label"]).column("label").to_numpy().astype(np.int64)
    if not len(labels):
        raise DataError(f"{files[2]}: holds no images; set data.test_per_class or give the source a test split")
    files += [EMBEDDINGS_INDEX] if params.encoder else []
    files += [TEXT / FEATURES_FILE] if params.text and (TEXT / FEATURES_FILE).is_file() else []
    hashes = [sha256_of(path) for path in files]
    return Project(params, load_prior(), labels, sha256_of_json(hashes))


def check_method(method: Method, project: Project) -> None:
    """Raise ParamsError if a method does not apply to the project, before anything is trained."""
    params = params_of(method, project.params)
    try:
        check_recipe(params.teacher, params.student, project.prior)
        network = network_of(params, project.data)
        for stage in {each.stage for each in network.chain} - {"classifier"}:
            check_batch(stage, getattr(params, stage), sum(project.prior.counts))
        if network.stage == "classifier":
            held = torch.from_numpy(read_split("validation", ["label"]).column("label").to_numpy().astype(np.int64))
            check_classes(params.classifier, project.prior, held)
    except ParamsError as error:
        raise ParamsError(f"{method.name} does not apply to this project: {error}") from None


def compare_methods(
    comparison: Comparison, folder: Path, budget: float | None, report: Callable[[str], None], save: Callable[[], None]
) -> None:
    """Train and evaluate every method with every seed, all methods of a seed before the next seed.

    Finished networks in `folder` are used again. budget: seconds after which no run starts, nor one that would end later by
    the time of finished runs; None for no limit. report: called with a line for each run; save: called after each run.
    """
    root, started = folder / NETWORKS, time.monotonic()
    total = len(comparison.methods) * len(comparison.seeds)
    for number, (seed, method, network) in enumerate(planned_runs(comparison), 1):
        head = f"{number:>{len(str(total))}}/{total}  seed {seed}  {method.name}"
        left = None if budget is None else budget - (time.monotonic() - started)
        finished = read_record(network, root) is not None
        if left is not None and not finished and not _fits(network, root, left):
            comparison.missing.append(Missing(method.name, seed, "budget"))
            report(f"{head}: not started, it would exceed the budget")
            continue
        try:
            run = _run(method, network, root, comparison.project.prior)
        except DataError:  # the data of all methods
            raise
        except StageError as error:
            comparison.missing.append(Missing(method.name, seed, str(error)))
            comparison.failed = True
            report(f"{head}: failed: {error}")
            continue
        comparison.runs.setdefault(method.name, []).append(run)
        row = summarise(comparison, method, [run], None)
        shares = "  ".join(
            f"{name} {value.value:.1%}" for name, value in row.accuracy.items() if value.value is not None
        )
        report(f"{head}: {shares}  {'trained before' if finished else counted(round(row.seconds), 'second')}")
        save()


def planned_runs(comparison: Comparison) -> Iterator[tuple[int, Method, Network]]:
    """Seed, method and network of every run, in order. Output that only slows the training down is switched off."""
    for seed in comparison.seeds:
        for method in comparison.methods:
            params = params_of(method, comparison.project.params)
            engine = params.engine.model_copy(update={"tensorboard": False})
            params = params.model_copy(update={"seed": seed, "engine": engine})
            yield seed, method, network_of(params, comparison.project.data)


def _run(method: Method, network: Network, root: Path, prior: Prior) -> Run:
    train_network(network, root)
    predicted = predictions(method, network, root, prior)
    records = [record for each in network.chain if (record := read_record(each, root))]
    return Run(network.params.seed, predicted.predicted, predicted.ece, records)


def _fits(network: Network, root: Path, left: float) -> bool:
    """Whether the unfinished networks of a run are expected to end within `left` seconds.

    A network takes as long as one of the same recipe; else its multiply-accumulates at the speed of finished networks of
    its stage. Without any, it is taken to fit.
    """
    if left <= 0:
        return False
    finished = [
        (content["recipe"], content["stage"], max(content["wall"], content["seconds"]), content["cost"])
        for path in sorted(root.glob(f"*/{RECORD}.json"))
        for content in [json.loads(path.read_text(encoding="utf-8"))]
    ]
    needed = 0.0
    for each in network.chain:
        if read_record(each, root):
            continue
        same = [wall for recipe, _, wall, _ in finished if recipe == each.recipe]
        stage = [(wall, cost["macs"]) for _, stage, wall, cost in finished if stage == each.stage and cost]
        if same:
            needed += statistics.median(same)
        elif stage and each.stage == "classifier":
            needed += max(wall for wall, _ in stage)
        elif stage and (cost := training_cost(each.params, each.stage, load_prior(), stored_encoder(each.params))):
            needed += cost.macs * statistics.median(wall / max(macs, 1) for wall, macs in stage)
    return needed <= left


def rows_of(comparison: Comparison, reference: str) -> list[Row]:
    """Rows of the methods that have a run, in order. reference: name of the method that the differences are against."""
    against = comparison.runs.get(reference)
    return [
        summarise(comparison, method, runs, None if method.name == reference else against)
        for method in comparison.methods
        if (runs := comparison.runs.get(method.name))
    ]


def summarise(comparison: Comparison, method: Method, runs: list[Run], against: list[Run] | None) -> Row:
    """Row of a method from its runs. against: runs of the reference; None for no differences."""
    labels, groups = comparison.project.labels, comparison.project.prior.groups
    weights = class_weights(groups, np.bincount(labels, minlength=len(groups)))
    correct = {run.seed: (run.predicted == labels).astype(float) for run in runs}
    accuracy = {
        name: clipped(estimate(np.stack([*correct.values()]), labels, share)) for name, share in weights.items()
    }
    others = {run.seed: (run.predicted == labels).astype(float) for run in against or []}
    paired = [correct[seed] - others[seed] for seed in correct if seed in others]
    difference = {name: estimate(np.stack(paired), labels, share) for name, share in weights.items()} if paired else {}
    errors, networks = [run.ece for run in runs], runs[0].networks
    costs = [network.cost for network in networks]
    return Row(
        method, list(correct), accuracy, difference, statistics.fmean(errors),
        statistics.stdev(errors) if len(errors) > 1 else None,
        statistics.fmean(sum(network.seconds for network in run.networks) for run in runs),
        None if None in costs else sum((cost for cost in costs if cost), Cost(0, 0, 0)),
        networks[-1].served,
    )  # fmt: skip
