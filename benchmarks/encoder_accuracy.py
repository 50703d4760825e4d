"""Test accuracy of classifiers on the stored features of a frozen encoder: last epoch, 5 seeds, mean ± sample std.

    python -m benchmarks.encoder_accuracy plankton --data DIR --size 112
    python -m benchmarks.encoder_accuracy tiny-imagenet-lt --data DIR --size 224
    python -m benchmarks.encoder_accuracy cifar10-if100 --data DIR --size 128 --text artifacts/text
    python -m benchmarks.encoder_accuracy plankton --data DIR --size 112 --tuned --seeds 0

Rows, with the params of recipes/photographs-lite0.yaml:
- kNN, LogisticRegression balanced: benchmarks/feature_classifiers.py. They use no random numbers.
- cross-entropy: the recipe's teacher trained without logit adjustment, and its plain logits. post-hoc: the same network with
  logits adjusted to the balanced prior. L_cls: the recipe's teacher.
- GML: L_cls and L_GML with a residual adapter (GML_STUDENT in benchmarks/encoder_projects.py), against the features of the
  teacher. L_cls, adapter: the same network, epochs and learning rates with L_cls alone.
- memory alone, and + memory: the mixture of Eq. 3 over all training features; tau and weight are fitted on validation. With
  --memory-rows also over K features, the means of clusters in large classes.
- NCM, cRT, tau-normalisation, LWS: recipes/methods/, second stages of a student that cross-entropy trains.
- With --text, the folder of stage embed_text: GML with text centres, row GML with its sentences in the place of the teacher's
  queues; GML with image and text centres, both terms. zero-shot: the class whose mean sentence has the largest cosine, without
  training; only if image and text features have one width. Features of classes without names are assigned in their order.
- With --tuned: L_cls and GML of a student that trains the encoder's last two blocks too, on augmented images (TUNED_STUDENT in
  benchmarks/encoder_projects.py). GML's keys are features of the frozen encoder.

Column `all` is the mean of per-class accuracies for the balanced target prior; many, medium and few are means over the
classes of a group; `images at train` is the share of correct test images for the training prior. Finished rows are stored
in the project's folder runs/ and not repeated. Test is read once per row; every choice is made on validation.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy import format_difference, format_mean_std, merged, publish
from benchmarks.encoder_projects import NOTES, add_options, prepare, project_folder, project_params
from benchmarks.encoder_rows import (
    TEXT_ALONE,
    Features,
    Row,
    memory_rows,
    rounding,
    rows,
    text_hash,
    text_rows,
    tuned_rows,
)
from pipeline.data.class_prior import load_prior
from pipeline.evaluation.network_metrics import network_metrics
from pipeline.features.stored import load_features
from pipeline.params import Params
from pipeline.shared.artifacts import TEXT, sha256_of_json, write_json
from pipeline.text.stored import INDEX_FILE, TextFeatures, load_text_features, write_text_features

COLUMNS = ("all", "many", "medium", "few")


def measure(row: Row, params: Params, data: Features) -> dict[str, Any]:
    """Return the cells of a row for one seed, from its file or after training."""
    name = row.name.replace(" ", "-").replace(",", "")
    params = row.changes(params)
    depends = params.model_dump(mode="json", include={"seed", *row.sections} if row.sections else {"encoder"})
    depends |= rounding(params) | text_hash(params if row.sections else None, alone=row.logits in TEXT_ALONE)
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


def copy_text(source: Path, classes: list[str]) -> TextFeatures:
    """Copy a folder of text features to the project, with its classes. Classes without names, 0 to C-1, are in label order."""
    names = json.loads((source / INDEX_FILE).read_text(encoding="utf-8"))["class_names"]
    numbers = [str(number) for number in range(len(names))]
    text = load_text_features(source, names if classes == numbers else classes)
    text = dataclasses.replace(text, class_names=tuple(classes))
    write_text_features(TEXT, text)
    return text


def table(results: dict[str, list[dict[str, Any]]], split: str = "test", against: str = "L_cls") -> str:
    """Markdown table, a row per method: percent, mean ± std over seeds; paired differences of `all` to row `against`."""
    heads = [*COLUMNS, "images at train", f"all, against {against}", "s a run"]
    lines = [f"| method | {' | '.join(heads)} |", "|---|" + "--:|" * len(heads)]
    for name, runs in results.items():
        cells = [format_mean_std([run[split][column] for run in runs]) for column in (*COLUMNS, "images")]
        base = [run[split]["all"] for run in results.get(against, [])]
        values = [run[split]["all"] for run in runs] * (len(base) if len(runs) == 1 else 1)
        paired = name != against and base and len(values) == len(base)
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
    parser.add_argument(
        "--text", type=Path, metavar="DIR", help="folder of stage embed_text: adds the rows of text centres"
    )
    parser.add_argument(
        "--memory-rows", type=int, nargs="+", default=[], metavar="K", help="adds memory alone with K stored features"
    )
    parser.add_argument("--tuned", action="store_true", help="adds the rows that train the encoder's last blocks")
    parser.add_argument(
        "--precision",
        choices=["float32", "bfloat16"],
        default="float32",
        help="engine.precision of training (default: %(default)s); bfloat16 is faster on a CPU with AMX",
    )
    parser.add_argument("--split", choices=["validation", "test"], default="test", help="default: %(default)s")
    parser.add_argument(
        "--against", metavar="ROW", default="L_cls", help="row of the differences (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="a Markdown file for the table")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    available = [*rows(), *memory_rows(options.memory_rows), *(text_rows() if options.text else [])]
    available += tuned_rows() if options.tuned else []
    known = [row.name for row in available]
    chosen = options.rows or known
    if options.against != "L_cls" and options.against not in chosen:
        parser.error(f"--against: {options.against!r} is not a row of the table; expected {', '.join(chosen)}")
    if unknown := set(chosen) - set(known):
        parser.error(f"--rows: {sorted(unknown)[0]!r} is unknown; expected {', '.join(known)}")
    params = project_params(options.data_set, options.data, options.encoder, options.size, options.views)
    params = merged(params, {"engine": {"precision": options.precision}})
    folder = project_folder(options.work, options.data_set, params)
    output, source = (path.absolute() if path else None for path in (options.output, options.text))
    prepare(params, folder)
    with contextlib.chdir(folder):
        splits = (load_features(params, split) for split in ("train", "validation", "test"))
        class_prior, results = load_prior(), {}
        text = copy_text(source, class_prior.classes) if source else None
        data = Features(*splits, class_prior, text)
        for row in [row for row in available if row.name in chosen]:
            if row.name == "zero-shot" and text.features.shape[1] != data.test.encoder["width"]:
                continue
            seeds = options.seeds if row.sections else [options.seeds[0]]
            results[row.name] = [measure(row, merged(params, {"seed": seed}), data) for seed in seeds]
    groups = ", ".join(f"{data.prior.groups.count(group)} {group}" for group in COLUMNS[1:])
    report = (
        f"`python -m benchmarks.encoder_accuracy {shlex.join(arguments or sys.argv[1:])}`\n\n"
        f"{options.encoder} at {options.size} pixels; {len(data.train):,} training, {len(data.validation):,} "
        f"validation and {len(data.test):,} test images; classes: {groups}. {os.cpu_count()} CPU cores, torch "
        f"{torch.__version__}, Python {platform.python_version()}. {NOTES[options.data_set]}\n\n"
        f"{table(results, options.split, options.against)}\n"
        f"Seeds {', '.join(map(str, options.seeds))}; last epoch; {options.split}.\n"
    )
    publish(report, output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
