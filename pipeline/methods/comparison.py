"""Train methods on the project's data set with its recipe, within a budget of time, and compare their predictions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from pipeline.data.class_prior import Prior, load_prior
from pipeline.data.dataset import should_stream
from pipeline.data.split_tables import count_rows, read_split
from pipeline.features.stored import stored_encoder, takes_features
from pipeline.methods.catalogue import Method, params_of
from pipeline.methods.cost import Cost, with_macs
from pipeline.methods.estimates import class_weights
from pipeline.methods.networks import (
    Network,
    Trained,
    fits,
    network_of,
    predictions,
    read_record,
    train_network,
)
from pipeline.model_io.devices import choose_device
from pipeline.params import Params
from pipeline.second_stage.refit import check_classes
from pipeline.shared.artifacts import EMBEDDINGS_INDEX, PRIOR, SPLIT, TEXT, sha256_of, sha256_of_json
from pipeline.shared.errors import DataError, ParamsError, StageError
from pipeline.shared.host_memory import free_bytes
from pipeline.text.stored import FEATURES_FILE
from pipeline.training.run import check_recipe
from pipeline.training.state import check_batch
from serving.shared.terminal import counted

NETWORKS = "networks"
SPLITS = ("train", "validation", "test")
NO_COST = "not started, because its run at equal epochs has no result or its cost is unknown"


@dataclass(frozen=True)
class Project:
    """What all methods share: params, prior, labels int64 [N] of the test split, and the hash of the data."""

    params: Params
    prior: Prior
    labels: np.ndarray
    data: str


@dataclass(frozen=True)
class Run:
    """A finished run of a method.

    epochs: of the student. predicted: predicted classes int [N]. ece: calibration error. networks: records of its networks.
    """

    seed: int
    epochs: int
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
    """Runs by method, in the order of the methods, the runs that are missing, and the methods that do not apply.

    equal_cost: name of the method whose cost the second runs have, with other epochs; None for no second runs, `equal`.
    """

    project: Project
    methods: list[Method]
    seeds: list[int]
    equal_cost: str | None = None
    runs: dict[str, list[Run]] = field(default_factory=dict)
    equal: dict[str, list[Run]] = field(default_factory=dict)
    missing: list[Missing] = field(default_factory=list)
    left_out: list[Missing] = field(default_factory=list)
    failed: bool = False

    @property
    def planned(self) -> int:
        """Number of runs of the whole comparison."""
        return len(self.methods) * len(self.seeds) * (2 if self.equal_cost else 1)

    @property
    def done(self) -> int:
        """Number of runs that have a result."""
        return sum(map(len, (*self.runs.values(), *self.equal.values())))


@dataclass(frozen=True)
class Planned:
    """A run before it is made. network: None if its epochs are not known. equal: it is one at equal cost."""

    seed: int
    method: Method
    network: Network | None
    equal: bool = False

    @property
    def name(self) -> str:
        """Name in messages."""
        return f"{self.method.name} at equal cost" if self.equal else self.method.name


def load_project(params: Params) -> Project:
    """Read prior, test labels and hashes of the project in the working folder.

    Raises ParamsError for task segmentation and if a stage before the training has not run, DataError if the test split is
    empty.
    """
    if params.segmentation:
        raise ParamsError("task is segmentation; expected classification, whose methods a comparison trains")
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
        _check_second_batch(params)
        if network.stage == "classifier":
            held = torch.from_numpy(read_split("validation", ["label"]).column("label").to_numpy().astype(np.int64))
            check_classes(params.classifier, project.prior, held)
    except ParamsError as error:
        raise ParamsError(f"{method.name} does not apply to this project: {error}") from None


def _check_second_batch(params: Params) -> None:
    """Raise ParamsError for a method that draws a second batch if the training images are streamed in a fixed order."""
    if not params.student.draws_second_batch or takes_features(params, "student"):
        return
    rows = sum(count_rows(split) for split in ("train", "validation"))
    if should_stream(params, rows, choose_device(params.device), free_bytes())[0]:
        raise ParamsError(
            f"stream.mode is {params.stream.mode} and the images are streamed in a fixed order, but each step draws a second "
            "batch; set stream.mode: off"
        )


def compare_methods(
    comparison: Comparison, folder: Path, budget: float | None, report: Callable[[str], None], save: Callable[[], None]
) -> None:
    """Train and evaluate every method with every seed, all methods of a seed before the next seed.

    Finished networks in `folder` are used again. budget: seconds after which no run starts, nor one that would end later by
    the time of finished runs; None for no limit. report: called with a line for each run; save: called after each run.
    """
    root, started = folder / NETWORKS, time.monotonic()
    total = comparison.planned
    for number, run in enumerate(planned_runs(comparison), 1):
        head, network = f"{number:>{len(str(total))}}/{total}  seed {run.seed}  {run.name}", run.network
        left = None if budget is None else budget - (time.monotonic() - started)
        finished = network is not None and read_record(network, root) is not None
        if network is None:
            comparison.missing.append(Missing(run.name, run.seed, NO_COST))
            report(f"{head}: {NO_COST}")
            continue
        if left is not None and not finished and not fits(network, root, left):
            comparison.missing.append(Missing(run.name, run.seed, "budget"))
            report(f"{head}: not started, it would exceed the budget")
            continue
        try:
            result = _run(run.method, network, root, comparison.project.prior)
        except DataError:  # the data of all methods
            raise
        except StageError as error:
            comparison.missing.append(Missing(run.name, run.seed, str(error)))
            comparison.failed = True
            report(f"{head}: failed: {error}")
            continue
        (comparison.equal if run.equal else comparison.runs).setdefault(run.method.name, []).append(result)
        shares = "  ".join(f"{name} {value:.1%}" for name, value in accuracies(comparison.project, result).items())
        seconds = sum(each.seconds for each in result.networks)
        epochs = f"{counted(result.epochs, 'epoch')}  " if run.equal else ""
        report(f"{head}: {shares}  {epochs}{'trained before' if finished else counted(round(seconds), 'second')}")
        save()


def accuracies(project: Project, run: Run) -> dict[str, float]:
    """Mean of the class accuracies of a run, of all classes and of each shot group that has test images."""
    tested = np.bincount(project.labels, minlength=len(project.prior.classes))
    correct = np.bincount(project.labels, run.predicted == project.labels, len(tested)) / np.maximum(tested, 1)
    weights = class_weights(project.prior.groups, tested)
    return {name: float(share @ correct) for name, share in weights.items() if share.any()}


def planned_runs(comparison: Comparison) -> Iterator[Planned]:
    """Every run, in order: all methods of a seed, the same at equal cost, then the next seed.

    A run at equal cost has its epochs from the cost of the run before it, which is made when the next one is asked for.
    """
    for seed in comparison.seeds:
        for method in comparison.methods:
            yield Planned(seed, method, network_of(_params(comparison, method, seed), comparison.project.data))
        for method in comparison.methods if comparison.equal_cost else []:
            costs, aim = (_costs(comparison, name, seed) for name in (method.name, comparison.equal_cost))
            network = None
            if costs and aim:
                params = with_macs(_params(comparison, method, seed), costs, sum(cost.macs for cost in aim.values()))
                network = network_of(params, comparison.project.data)
            yield Planned(seed, method, network, equal=True)


def _params(comparison: Comparison, method: Method, seed: int) -> Params:
    """Params of a run. Output that only slows the training down is switched off."""
    params = params_of(method, comparison.project.params)
    engine = params.engine.model_copy(update={"tensorboard": False})
    return params.model_copy(update={"seed": seed, "engine": engine})


def _costs(comparison: Comparison, name: str | None, seed: int) -> dict[str, Cost] | None:
    """Cost of each stage of a method's run at equal epochs; None without a run or with an unknown cost."""
    run = next((each for each in comparison.runs.get(name or "", []) if each.seed == seed), None)
    costs = {each.stage: each.cost for each in run.networks if each.cost} if run else {}
    return costs if run and len(costs) == len(run.networks) else None


def _run(method: Method, network: Network, root: Path, prior: Prior) -> Run:
    train_network(network, root)
    predicted = predictions(method, network, root, prior)
    records = [record for each in network.chain if (record := read_record(each, root))]
    params = network.params
    return Run(params.seed, params.student.epochs, predicted.predicted, predicted.ece, records)
