"""Stage `seeds`: train and evaluate each of params.seeds and report the spread of metrics; writes artifacts/seeds/."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import classifier, student, teacher
from pipeline.command_line import stage_main
from pipeline.data.class_prior import load_prior
from pipeline.evaluation.network_metrics import network_logits, network_metrics, student_parts
from pipeline.evaluation.segmentation import evaluate_networks
from pipeline.features.stored import evaluation_inputs
from pipeline.model_io.checkpoint import BEST, student_folder
from pipeline.model_io.devices import choose_device
from pipeline.params import Params
from pipeline.shared.artifacts import (
    EMBEDDINGS_INDEX,
    EVALUATION,
    PRIOR,
    SEEDS,
    SPLIT,
    as_csv,
    sha256_of,
    sha256_of_json,
    unfinished,
    whole_folder,
    write_file,
    write_json,
)
from pipeline.shared.errors import ParamsError
from serving.shared.terminal import print

Metrics = dict[str, Any]
# Params that the metrics of a seed depend on, as in dvc.yaml. Keys of evaluate that only the report uses are excluded.
DEPENDS: dict[str, Any] = {
    "classifier": True,
    "engine": {"precision"},
    "evaluate": {"ece_bins", "top_k"},
    "image": True,
    "seed": True,
    "stream": {"decode", "shuffle_mib"},
    "segmentation": True,
    "student": True,
    "teacher": True,
}


@dataclass(frozen=True)
class Result:
    """The student's balanced accuracy of the last epoch, by seed; for task segmentation its mIoU."""

    scores: dict[int, float]
    output: Path
    measure: str = "balanced accuracy"

    def __str__(self) -> str:
        values = list(self.scores.values())
        if len(values) == 1:
            return f"one seed, {self.measure} {values[0]:.1%}; set `seeds` for a spread → {self.output}"
        spread = f"{statistics.mean(values):.1%} ± {statistics.stdev(values):.1%}"
        return f"{len(values)} seeds, {self.measure} {spread} → {self.output}/summary.json"


def run(params: Params, output: Path = SEEDS) -> Result:
    """Train and evaluate every further seed, then write all metrics (seeds.csv), mean and standard deviation (summary.json).

    The run of params.seed is the released one and already exists. After an interruption, finished seeds are kept and
    the others resume. engine.side_by_side processes share the device. Raises ParamsError for a repeated seed.
    """
    further_seeds = params.seeds
    if len({params.seed, *further_seeds}) != 1 + len(further_seeds):
        raise ParamsError(
            f"seeds is {further_seeds}; expected each seed once, and not seed ({params.seed}), which runs anyway"
        )
    metrics_by_seed = {params.seed: json.loads((EVALUATION / "metrics.json").read_text(encoding="utf-8"))}
    work = unfinished(output)
    if further_seeds:
        metrics_by_seed.update(_train_all(params, work))
    with whole_folder(output) as folder:
        write_file(folder / "seeds.csv", as_table(metrics_by_seed))
        write_json(folder / "summary.json", summary(metrics_by_seed))
    shutil.rmtree(work, ignore_errors=True)
    key, measure = ("miou", "mIoU") if params.segmentation else ("balanced_accuracy", "balanced accuracy")
    scores = {seed: metrics["student"]["balanced"][key] for seed, metrics in metrics_by_seed.items()}
    return Result(scores, output, measure)


def _train_all(params: Params, work: Path) -> Iterator[tuple[int, Metrics]]:
    workers = side_by_side(params)
    if workers == 1:
        for seed in params.seeds:
            yield seed, train_seed(params, seed, work)
        return
    with worker_pool(workers) as pool:
        running = {pool.submit(train_seed, params, seed, work): seed for seed in params.seeds}
        for completed in as_completed(running):
            yield running[completed], completed.result()


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """Processes that end when this process ends by any cause: DVC and a kill end the stage alone, and they would train on."""
    # Spawned, because CUDA cannot be used in a forked process.
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    def wait() -> None:
        multiprocessing.parent_process().join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def side_by_side(params: Params) -> int:
    """Number of seeds that train in parallel: engine.side_by_side; `auto` is all of them on a GPU, one on the CPU."""
    if params.engine.side_by_side != "auto":
        return min(params.engine.side_by_side, len(params.seeds))
    return len(params.seeds) if choose_device(params.device).type == "cuda" else 1


def train_seed(params: Params, seed: int, work: Path) -> Metrics:
    """Train one seed; returns metrics of teacher, student and the student's best epoch, cached in work/<seed>/."""
    recipe = params.model_copy(update={"seed": seed})
    folder = work / str(seed)
    fingerprint = sha256_of_json(
        {
            "params": recipe.model_dump(mode="json", include=DEPENDS),
            "data": [sha256_of(SPLIT / f"{name}.parquet") for name in ("train", "validation", "test")],
            "prior": sha256_of(PRIOR),
            "features": sha256_of(EMBEDDINGS_INDEX) if params.encoder else None,
        }
    )
    cache = folder / "metrics.json"
    if cache.is_file():
        cached = json.loads(cache.read_text(encoding="utf-8"))
        if cached["fingerprint"] == fingerprint:
            return cached["metrics"]
    print(f"seed {seed}", flush=True)
    teacher.run(recipe, folder / "teacher")
    student.run(recipe, folder / "student", folder / "teacher")
    if recipe.classifier.kind != "none":
        classifier.run(recipe, folder / "classifier", folder / "student")
    metrics = _evaluate(recipe, folder)
    write_json(cache, {"fingerprint": fingerprint, "metrics": metrics})
    return metrics


def _evaluate(params: Params, folder: Path) -> Metrics:
    if params.segmentation:
        folders = {name: folder / name for name in ("teacher", "student")}
        return evaluate_networks(params, load_prior(), folders, choose_device(params.device)).metrics
    prior, inputs = load_prior(), evaluation_inputs(params, "test")
    test = inputs["student"]
    device, labels = choose_device(params.device), test.labels.numpy()
    stage = student_folder(params)[1]
    networks = {"teacher": folder / "teacher", "student": folder / stage}
    if (folder / "student" / BEST).is_dir():
        networks["student_best_epoch"] = folder / "student" / BEST
    logits = {
        name: network_logits(path, name, inputs["teacher"] if name == "teacher" else test, params.image, prior, device)
        for name, path in networks.items()
    }
    logits |= student_parts(folder / "student", test, params.image, prior, device, refitted=stage != "student")
    return {name: network_metrics(values, labels, prior, params.evaluate) for name, values in logits.items()}


def summary(metrics_by_seed: dict[int, Metrics]) -> dict[str, Any]:
    """Network → target prior → metric → {mean, std, seeds}; std is the sample standard deviation.

    A metric that is n/a is None.
    """
    first = next(iter(metrics_by_seed.values()))
    return {
        "seeds": list(metrics_by_seed),
        **{
            network: {
                prior: {
                    name: _spread([metrics[network][prior][name] for metrics in metrics_by_seed.values()])
                    for name, value in values.items()
                    if not isinstance(value, dict)
                }
                for prior, values in by_prior.items()
            }
            for network, by_prior in first.items()
        },
    }


def _spread(values: list[float | None]) -> dict[str, Any] | None:
    numbers = [value for value in values if value is not None]
    if not numbers:
        return None
    std = statistics.stdev(numbers) if len(numbers) > 1 else None
    return {"mean": statistics.fmean(numbers), "std": std, "seeds": values}


def as_table(metrics_by_seed: dict[int, Metrics]) -> str:
    """All metrics as CSV, one row per seed, network and target prior."""
    return as_csv(
        [
            {"seed": seed, "network": network, "target_prior": prior}
            | {name: value for name, value in values.items() if not isinstance(value, dict)}
            for seed, metrics in metrics_by_seed.items()
            for network, by_prior in metrics.items()
            for prior, values in by_prior.items()
        ]
    )


if __name__ == "__main__":
    sys.exit(stage_main(run, "Train further seeds and report mean and spread."))
