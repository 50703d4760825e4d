"""Test accuracy of classifiers on the stored features of a frozen encoder: last epoch, 5 seeds, mean ± sample std.

    python -m benchmarks.encoder_accuracy plankton --data DIR --size 112
    python -m benchmarks.encoder_accuracy tiny-imagenet-lt --data DIR --size 224
    python -m benchmarks.encoder_accuracy cifar10-if100 --data DIR --size 128

Rows, with the params of recipes/photographs-lite0.yaml:
- kNN, LogisticRegression balanced: benchmarks/feature_classifiers.py. They use no random numbers.
- cross-entropy: the recipe's teacher trained without logit adjustment, and its plain logits. post-hoc: the same network with
  logits adjusted to the balanced prior. L_cls: the recipe's teacher.
- GML: L_cls and L_GML with a residual adapter (GML_STUDENT in benchmarks/encoder_projects.py), against the features of the
  teacher. L_cls, adapter: the same network, epochs and learning rates with L_cls alone.
- memory alone, and + memory: the mixture of Eq. 3 over all training features; tau and weight are fitted on validation.

Column `all` is the mean of per-class accuracies for the balanced target prior; many, medium and few are means over the
classes of a group; `images at train` is the share of correct test images for the training prior. Finished rows are stored
in the project's folder runs/ and not repeated. Test is read once per row; every choice is made on validation.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.accuracy import classification_alone, format_difference, format_mean_std, merged, publish
from benchmarks.encoder_projects import NOTES, add_options, gml_params, prepare, project_folder, project_params
from benchmarks.feature_classifiers import knn, logistic_regression
from models.networks.memory import FeatureMemory, build_memory
from models.networks.memory_fit import LEAST_WEIGHT, fit_memory
from pipeline import student, teacher
from pipeline.data.class_prior import Prior, load_prior
from pipeline.evaluation.network_metrics import network_logits, network_metrics
from pipeline.features.stored import FeatureImages, load_features
from pipeline.model_io.devices import choose_device
from pipeline.params import Params
from pipeline.shared.artifacts import sha256_of_json, write_json

COLUMNS = ("all", "many", "medium", "few")


@dataclass(frozen=True)
class Features:
    """The features of the three splits of a project, and its class prior."""

    train: FeatureImages
    validation: FeatureImages
    test: FeatureImages
    prior: Prior


Logits = tuple[np.ndarray, np.ndarray]  # balanced logits of validation and test


@dataclass(frozen=True)
class Row:
    """A row of the table. logits: (params of one seed, features) → balanced logits. plain: report the target prior train.

    sections: sections of params that the result depends on; a row without sections has no seeds.
    """

    name: str
    logits: Callable[[Params, Features], Logits]
    sections: tuple[str, ...] = ()
    plain: bool = False


def rows() -> list[Row]:
    """Return all rows in the order of the table."""
    teacher_sections, both = ("teacher",), ("teacher", "student")
    return [
        Row("kNN", lambda _, data: _without_training(knn, data)),
        Row("LogisticRegression balanced", lambda _, data: _without_training(logistic_regression, data)),
        Row("cross-entropy", cross_entropy, teacher_sections, plain=True),
        Row("cross-entropy, post-hoc", cross_entropy, teacher_sections),
        Row("L_cls", l_cls, teacher_sections),
        Row("L_cls, adapter", l_cls_adapter, both),
        Row("GML", gml, both),
        Row("memory alone", lambda _, data: with_memory(None, data)),
        Row("L_cls + memory", lambda params, data: with_memory(l_cls(params, data), data), teacher_sections),
        Row("GML + memory", lambda params, data: with_memory(gml(params, data), data), both),
    ]


def _without_training(classifier: Callable[..., Logits], data: Features) -> Logits:
    train, validation, test = ((split.images[:, 0], split.labels) for split in (data.train, data.validation, data.test))
    return classifier(*train, *validation, test[0], len(data.prior.classes))


def cross_entropy(params: Params, data: Features) -> Logits:
    """Return logits of the recipe's teacher, trained without logit adjustment."""
    params = merged(params, {"teacher": {"adjustment": 0.0}})
    return network(params, data, "teacher", lambda output: teacher.run(params, output))


def l_cls(params: Params, data: Features) -> Logits:
    """Return logits of the recipe's teacher."""
    return network(params, data, "teacher", lambda output: teacher.run(params, output))


def l_cls_adapter(params: Params, data: Features) -> Logits:
    """Return logits of the network of row GML, trained with L_cls alone."""
    params = gml_params(params)
    return network(params, data, "adapter", lambda output: classification_alone(params, 1.0, output))


def gml(params: Params, data: Features) -> Logits:
    """Return logits of the recipe's student with L_GML, against the features of the recipe's teacher."""
    params = gml_params(params)

    def train(output: Path) -> None:
        l_cls(params, data)
        student.run(params, output, run_folder(params, "teacher"))

    return network(params, data, "student", train)


def run_folder(params: Params, kind: str) -> Path:
    """Return the folder of a trained network; its name is a hash of the params that the network depends on."""
    sections = {
        "teacher": {"seed", "teacher"},
        "adapter": {"seed", "student"},
        "student": {"seed", "teacher", "student"},
    }
    depends = params.model_dump(mode="json", include=sections[kind])
    return Path(f"runs/{kind}-{sha256_of_json(depends)[:12]}")


def network(params: Params, data: Features, kind: str, train: Callable[[Path], object]) -> Logits:
    """Return balanced logits of a network. It is trained unless its folder exists."""
    folder = run_folder(params, kind)
    if not (folder / "model.safetensors").is_file():
        train(folder)
    device = choose_device(params.device)
    stage = "teacher" if kind == "teacher" else "student"
    validation, test = (
        network_logits(folder, stage, split, params.image, data.prior, device) for split in (data.validation, data.test)
    )
    return validation, test


def with_memory(base: Logits | None, data: Features) -> Logits:
    """Add the logits of the memory of all training images to `logits`; None: return those of the memory alone."""
    classes = len(data.prior.classes)
    validation, test = base or tuple(np.zeros((len(s), classes), np.float32) for s in (data.validation, data.test))
    stored = build_memory(data.train.images[:, 0], data.train.labels, classes, len(data.train))
    least = LEAST_WEIGHT if base is None else 0.0
    fit = fit_memory(stored, data.validation.images[:, 0], data.validation.labels, torch.from_numpy(validation), least)
    memory = FeatureMemory(stored, classes, fit.tau, fit.weight)
    with torch.inference_mode():
        added = [
            torch.cat([memory(part) for part in split.images[:, 0].split(256)]).numpy()
            for split in (data.validation, data.test)
        ]
    return validation + added[0], test + added[1]


def measure(row: Row, params: Params, data: Features) -> dict[str, Any]:
    """Return the cells of a row for one seed, from its file or after training."""
    name = row.name.replace(" ", "-").replace(",", "")
    section_params = gml_params(params) if "student" in row.sections else params
    depends = section_params.model_dump(mode="json", include={"seed", *row.sections} if row.sections else {"encoder"})
    path = Path(f"runs/{name}-{sha256_of_json(depends)[:12]}.json")
    if not path.is_file():
        print(f"seed {params.seed}, {row.name}", flush=True)
        started = time.perf_counter()
        logits = row.logits(params, data)
        seconds = time.perf_counter() - started
        cells = {}
        for split, values in (("validation", logits[0]), ("test", logits[1])):
            labels = getattr(data, split).labels.numpy()
            metrics = network_metrics(values, labels, data.prior, params.evaluate)
            balanced = metrics["train" if row.plain else "balanced"]
            groups = {column: balanced[column] for column in COLUMNS[1:]}
            cells[split] = {"all": balanced["balanced_accuracy"], **groups, "images": metrics["train"]["all"]}
        write_json(path, {**cells, "seconds": seconds})
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def table(results: dict[str, list[dict[str, Any]]], split: str = "test") -> str:
    """Markdown table, a row per method: percent, mean ± std over seeds; paired differences of `all` to L_cls."""
    heads = [*COLUMNS, "images at train", "all, against L_cls", "s a run"]
    lines = [f"| method | {' | '.join(heads)} |", "|---|" + "--:|" * len(heads)]
    for name, runs in results.items():
        cells = [format_mean_std([run[split][column] for run in runs]) for column in (*COLUMNS, "images")]
        base = [run[split]["all"] for run in results.get("L_cls", [])]
        values = [run[split]["all"] for run in runs] * (len(base) if len(runs) == 1 else 1)
        paired = name != "L_cls" and base and len(values) == len(base)
        differences = [own - other for own, other in zip(values, base, strict=True)] if paired else []
        cells.append(format_difference(differences) if differences else "")
        lines.append(f"| {name} | {' | '.join(cells)} | {statistics.median(run['seconds'] for run in runs):,.0f} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.encoder_accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)), help="default: 0 1 2 3 4")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="some of them (default: all)")
    parser.add_argument("--split", choices=["validation", "test"], default="test", help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="a Markdown file for the table")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    known = [row.name for row in rows()]
    if unknown := set(options.rows or known) - set(known):
        parser.error(f"--rows: {sorted(unknown)[0]!r} is unknown; expected {', '.join(known)}")
    params = project_params(options.data_set, options.data, options.encoder, options.size, options.views)
    folder = project_folder(options.work, options.data_set, params)
    output = options.output.absolute() if options.output else None
    prepare(params, folder)
    with contextlib.chdir(folder):
        splits = (load_features(params, split) for split in ("train", "validation", "test"))
        data, results = Features(*splits, load_prior()), {}
        for row in [row for row in rows() if row.name in (options.rows or known)]:
            seeds = options.seeds if row.sections else [options.seeds[0]]
            results[row.name] = [measure(row, merged(params, {"seed": seed}), data) for seed in seeds]
    groups = ", ".join(f"{data.prior.groups.count(group)} {group}" for group in COLUMNS[1:])
    report = (
        f"`python -m benchmarks.encoder_accuracy {shlex.join(arguments or sys.argv[1:])}`\n\n"
        f"{options.encoder} at {options.size} pixels, frozen; {len(data.train):,} training, {len(data.validation):,} "
        f"validation and {len(data.test):,} test images; classes: {groups}. {os.cpu_count()} CPU cores, torch "
        f"{torch.__version__}, Python {platform.python_version()}. {NOTES[options.data_set]}\n\n"
        f"{table(results, options.split)}\nSeeds {', '.join(map(str, options.seeds))}; last epoch; {options.split}.\n"
    )
    publish(report, output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
