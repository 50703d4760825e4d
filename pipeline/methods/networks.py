"""The networks that a comparison trains, each once, and the predictions of a method on the test split."""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
import torch

from pipeline import classifier, student, teacher
from pipeline.data.class_prior import Prior, load_prior
from pipeline.evaluation.metrics import adjusted_probabilities, expected_calibration_error
from pipeline.evaluation.network_metrics import TARGET_PRIORS, network_logits
from pipeline.features.stored import evaluation_inputs, stored_encoder, takes_features
from pipeline.methods.catalogue import Method
from pipeline.methods.cost import Cost, Served, refit_cost, served_size, training_cost
from pipeline.model_io.checkpoint import WEIGHTS, load_config
from pipeline.model_io.devices import choose_device
from pipeline.params import Params
from pipeline.shared.artifacts import sha256_of_json, write_file, write_json
from pipeline.training.history import METRICS, PRETRAINING
from pipeline.training.student_setup import weights_of

RECORD, PREDICTIONS = "record", "predictions"


@dataclass(frozen=True)
class Network:
    """A network of a stage: `teacher`, `student` or `classifier`, for the params of one method and seed.

    first: the teacher of a student that needs one, or the student of a second stage. data: hash of split, prior and
    features.
    """

    stage: str
    params: Params
    data: str
    first: Network | None = None

    @property
    def recipe(self) -> str:
        """Hash of all that the network depends on, without seed and data."""
        params = self.params.model_dump(mode="json")
        depends = {
            "stage": self.stage, "section": params[self.stage], "image": params["image"],
            "precision": params["engine"]["precision"], "torch": torch.__version__,
            "stream": [params["stream"][key] for key in ("mode", "decode", "shuffle_mib")],
            "first": self.first.recipe if self.first else None,
        }  # fmt: skip
        return sha256_of_json(depends)

    @property
    def name(self) -> str:
        """Name of the network's folder."""
        key = sha256_of_json({"recipe": self.recipe, "data": self.data})
        return f"{self.stage}-{self.params.seed}-{key[:12]}"

    @property
    def chain(self) -> list[Network]:
        """The networks before this one, and itself."""
        return [*(self.first.chain if self.first else []), self]


@dataclass(frozen=True)
class Trained:
    """Record of a finished network. seconds: of training steps; wall: of the stage as it ran last."""

    recipe: str
    stage: str
    seconds: float
    wall: float
    cost: Cost | None
    served: Served


def network_of(params: Params, data: str) -> Network:
    """The network that the params evaluate and export, with the networks that it needs."""
    needed = weights_of(params.student).needs_teacher(params.student.contrast_encoder)
    trained = Network("student", params, data, Network("teacher", params, data) if needed else None)
    return trained if params.classifier.kind == "none" else Network("classifier", params, data, trained)


def read_record(network: Network, root: Path) -> Trained | None:
    """Record of a network in folder `root`; None if it is not finished, or its weights or a valid record are missing."""
    folder = root / network.name
    return _record_in(folder) if (folder / network.stage / WEIGHTS).is_file() else None


def _record_in(folder: Path) -> Trained | None:
    """Record in the folder of a network; None without a valid one."""
    try:
        content = json.loads((folder / f"{RECORD}.json").read_text(encoding="utf-8"))
        cost = Cost(**content["cost"]) if content["cost"] else None
        return Trained(**{**content, "cost": cost, "served": Served(**content["served"])})
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


def train_network(network: Network, root: Path) -> Trained:
    """Train a network and those before it in folder `root`, unless they are finished; an interrupted one resumes.

    The output of a stage goes to the file `log` of its folder. Raises as the stages do.
    """
    if record := read_record(network, root):
        return record
    first = train_network(network.first, root) if network.first else None
    folder = root / network.name
    folder.mkdir(parents=True, exist_ok=True)
    output, started = folder / network.stage, time.perf_counter()
    with (
        (folder / "log").open("a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        _run_stage(network, output, root)
    wall = time.perf_counter() - started
    prior, encoder = load_prior(), stored_encoder(network.params)
    if network.stage == "classifier":
        assert first
        second_stage, seconds = load_config(output, network.stage).second_stage or {}, wall
        cost = refit_cost(second_stage, sum(prior.counts), first.served, takes_features(network.params, "student"))
    else:
        seconds = _training_seconds(output, getattr(network.params, network.stage).batch_size, sum(prior.counts))
        cost = training_cost(network.params, network.stage, prior, encoder)
    record = Trained(network.recipe, network.stage, seconds, wall, cost, served_size(output, network.stage))
    write_json(folder / f"{RECORD}.json", asdict(record))
    return record


def fits(network: Network, root: Path, left: float) -> bool:
    """Whether the unfinished networks of a run are expected to end within `left` seconds.

    A network takes as long as one of the same recipe; else its multiply-accumulates at the speed of finished networks of
    its stage. Without any, it is taken to fit.
    """
    if left <= 0:
        return False
    records = [_record_in(path.parent) for path in sorted(root.glob(f"*/{RECORD}.json"))]
    finished = [(each.recipe, each.stage, max(each.wall, each.seconds), each.cost) for each in records if each]
    needed = 0.0
    for each in network.chain:
        if read_record(each, root):
            continue
        same = [wall for recipe, _, wall, _ in finished if recipe == each.recipe]
        stage = [(wall, cost.macs) for _, stage, wall, cost in finished if stage == each.stage and cost]
        if same:
            needed += statistics.median(same)
        elif stage and each.stage == "classifier":
            needed += max(wall for wall, _ in stage)
        elif stage and (cost := training_cost(each.params, each.stage, load_prior(), stored_encoder(each.params))):
            needed += cost.macs * statistics.median(wall / max(macs, 1) for wall, macs in stage)
    return needed <= left


def _run_stage(network: Network, output: Path, root: Path) -> None:
    first = root / network.first.name / network.first.stage if network.first else root / "none"
    if network.stage == "teacher":
        teacher.run(network.params, output)
    elif network.stage == "student":
        student.run(network.params, output, first)
    else:
        classifier.run(network.params, output, first)


def _training_seconds(folder: Path, batch: int, images: int) -> float:
    """Seconds of the training steps, with a pretraining, from the speed of each epoch; correct for a resumed run too."""
    files = [path for name in (METRICS, PRETRAINING) if (path := folder / name).is_file()]
    epochs = [json.loads(line) for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    speeds = [epoch["images_per_second"] for epoch in epochs if "images_per_second" in epoch]
    return float(sum(images // batch * batch / speed for speed in speeds))


@dataclass(frozen=True)
class Predictions:
    """Predictions of a method on the test split. predicted: int [N]; ece: calibration error, classes weighted equally."""

    predicted: np.ndarray
    ece: float


def predictions(method: Method, network: Network, root: Path, prior: Prior) -> Predictions:
    """Predictions of a trained network for the target prior of the method: from their file, or computed without a valid one."""
    params = network.params
    path = root / network.name / f"{PREDICTIONS}-{method.predicts}-{params.evaluate.ece_bins}.safetensors"
    try:
        stored = safetensors.numpy.load(path.read_bytes())
    except (FileNotFoundError, safetensors.SafetensorError):
        test, device = evaluation_inputs(params, "test")["student"], choose_device(params.device)
        logits = network_logits(root / network.name / network.stage, network.stage, test, params.image, prior, device)
        p = adjusted_probabilities(logits, np.array(prior.log_prior), TARGET_PRIORS[method.predicts])
        labels = test.labels.numpy()
        weights = 1 / np.bincount(labels, minlength=len(prior.classes))[labels]
        ece = expected_calibration_error(p, labels, params.evaluate.ece_bins, weights)
        tensors = {"predicted": p.argmax(1).astype(np.int32), "ece": np.array([ece])}
        write_file(path, safetensors.numpy.save(tensors))
        stored = tensors
    return Predictions(stored["predicted"], float(stored["ece"][0]))
