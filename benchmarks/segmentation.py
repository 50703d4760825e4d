"""mIoU and mAcc on CamVid: cross-entropy, L_cls and L_cls + L_GML at prior strengths 0, 0.2 and 1 (Table 8, Fig. 2).

    python -m benchmarks.segmentation --data DIR --work runs/segmentation    # DIR holds camvid-240.parquet

The stages of recipes/camvid-cpu.yaml train every row: the same network, epochs, batches and learning rates. The network
of the last epoch is evaluated on the test split; the validation split of the pack, every second frame of one drive, is
not used. The rows of L_GML compare against the network of `L_cls 1` of the same seed, so that their training costs that
of the teacher in addition. A finished row of a seed is stored in --work and not repeated, and an interrupted one resumes
from its last checkpoint.

Areas are stored for serving strengths from -1 to 1. A network acts at strength s like one trained with alpha = 1 - s; the
first two tables have each network as it was trained, the third all its strengths.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.accuracy import format_difference, format_mean_std, merged, publish, recipe_params
from benchmarks.machine import hardware, versions
from models.segmentation.metrics import Areas
from pipeline import prior, split, student, teacher
from pipeline.data.class_prior import load_prior
from pipeline.evaluation.segmentation import STRENGTHS, load_network
from pipeline.model_io.devices import choose_device
from pipeline.params import Params
from pipeline.segmentation.dataset import LabelMapSplit
from pipeline.segmentation.inference import areas_by_adjustment
from pipeline.shared.artifacts import SPLIT, sha256_of_json, write_file

RECIPE = Path("recipes/camvid-cpu.yaml")
# Sections of params.yaml that affect the result of a row.
SECTIONS = {"device", "engine", "data", "stream", "image", "prior", "segmentation", "teacher", "student"}
TEACHER = "L_cls 1"
# Row: strength of the prior in its losses, the stage that trains it, and its changes of the recipe.
ROWS: dict[str, tuple[float, str, dict[str, Any]]] = {
    "cross-entropy": (0.0, "teacher", {"segmentation": {"classifier": "linear"}, "teacher": {"adjustment": 0.0}}),
    **{f"L_cls {alpha:g}": (alpha, "teacher", {"teacher": {"adjustment": alpha}}) for alpha in (1.0, 0.2, 0.0)},
    **{
        f"L_cls + L_GML {alpha:g}": (alpha, "student", {"student": {"adjustment": alpha, "prior_strength": alpha}})
        for alpha in (1.0, 0.2, 0.0)
    },
}
COLUMNS = {
    "miou": "mIoU", "macc": "mAcc", "aacc": "aAcc", "miou_many": "mIoU many", "miou_medium": "mIoU medium",
    "miou_few": "mIoU few", "macc_few": "mAcc few",
}  # fmt: skip


def measure(name: str, params: Params) -> dict[str, Any]:
    """Train and evaluate a row for params.seed in the current folder, or read its stored result."""
    _, stage, changes = ROWS[name]
    folder = Path(f"runs/{params.seed}")
    output = folder / name.replace(" ", "-")
    stored = output.with_name(f"{output.name}.json")
    if stored.is_file():
        result: dict[str, Any] = json.loads(stored.read_text(encoding="utf-8"))
        return result
    own, start = merged(params, changes), time.process_time()
    if stage == "teacher":
        teacher.run(own, output)
    else:
        student.run(own, output, folder / TEACHER.replace(" ", "-"))
    seconds = time.process_time() - start
    result = {"cpu_seconds": seconds, "areas": areas_by_strength(own, output, stage)}
    write_file(stored, json.dumps(result) + "\n")
    print(f"seed {params.seed}, {name}: {values_of(result, ROWS[name][0])}, {seconds:.0f} s of CPU time", flush=True)
    return result


def areas_by_strength(params: Params, folder: Path, stage: str) -> list[list[list[int]]]:
    """Intersection, predicted and labelled pixels of each class on the test split, for each of STRENGTHS."""
    device = choose_device(params.device)
    model, added = load_network(params, folder, stage, load_prior(), list(STRENGTHS))
    test = LabelMapSplit(params, "test")
    totals, _ = areas_by_adjustment(model.to(device), test, params.image, device, added)
    return [[values.tolist() for values in (a.intersection, a.predicted, a.labelled)] for a in totals]


def areas_of(result: dict[str, Any], alpha: float) -> Areas:
    """Areas of a stored result where it acts like a network trained with alpha."""
    return Areas(*map(np.array, result["areas"][STRENGTHS.index(round(1 - alpha, 6))]))


def values_of(result: dict[str, Any], alpha: float, groups: list[str] | None = None) -> dict[str, float | None]:
    """Metrics of a stored result, in 0..1."""
    return areas_of(result, alpha).metrics(groups)


def table(results: dict[str, list[dict[str, Any]]], groups: list[str]) -> str:
    """Mean ± sample deviation over the seeds, of every row as it was trained."""
    lines = [f"| trained with | {' | '.join(COLUMNS.values())} | CPU minutes a seed | seeds |"]
    lines.append("|---|" + "--:|" * (len(COLUMNS) + 2))
    for name, runs in results.items():
        values = [values_of(run, ROWS[name][0], groups) for run in runs]
        cells = [format_mean_std([entry[column] for entry in values]) for column in COLUMNS]
        minutes = statistics.median(run["cpu_seconds"] for run in runs) / 60
        lines.append(f"| {name} | {' | '.join(cells)} | {minutes:.1f} | {len(runs)} |")
    return "\n".join(lines) + "\n"


def differences(results: dict[str, list[dict[str, Any]]]) -> str:
    """Differences paired by seed, of every row as it was trained: to cross-entropy, and of L_GML to L_cls at the same alpha."""
    columns = [(base, metric) for base in ("cross-entropy", "L_cls") for metric in ("mIoU", "mAcc")]
    lines = [f"| trained with | {' | '.join(f'{metric}, against {base}' for base, metric in columns)} |"]
    lines.append("|---|" + "--:|" * len(columns))
    for name in results:
        others = {"cross-entropy": "cross-entropy", "L_cls": name.replace(" + L_GML", "")}
        cells = [difference(results, name, others[base], metric.lower()) for base, metric in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def difference(results: dict[str, list[dict[str, Any]]], name: str, other: str, metric: str) -> str:
    """Difference of one row to another in percent, with its interval; empty for the row itself and without the other."""
    if name == other or other not in results:
        return ""
    values = [[values_of(run, ROWS[row][0])[metric] or 0.0 for run in results[row]] for row in (name, other)]
    return format_difference([own - its for own, its in zip(*values, strict=True)])


def curve(results: dict[str, list[dict[str, Any]]]) -> str:
    """mIoU / mAcc of every row served at each strength, named by the alpha that it acts like; mean over the seeds."""
    alphas = [round(1 - strength, 6) for strength in STRENGTHS]
    lines = [f"| trained with | {' | '.join(f'{alpha:g}' for alpha in alphas)} |", "|---|" + "--:|" * len(alphas)]
    for name, runs in results.items():
        cells = []
        for alpha in alphas:
            entries = [values_of(run, alpha) for run in runs]
            means = (100 * statistics.fmean(entry[key] or 0.0 for entry in entries) for key in ("miou", "macc"))
            cells.append(" / ".join(f"{mean:.1f}" for mean in means))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def by_class(results: dict[str, list[dict[str, Any]]], classes: list[str]) -> str:
    """IoU of each class of every row as it was trained, mean over the seeds."""
    lines = [f"| trained with | {' | '.join(classes)} |", "|---|" + "--:|" * len(classes)]
    for name, runs in results.items():
        values = 100 * np.mean([areas_of(run, ROWS[name][0]).iou() for run in runs], axis=0)
        lines.append(f"| {name} | {' | '.join(f'{value:.1f}' for value in values)} |")
    return "\n".join(lines) + "\n"


def prepare(params: Params) -> None:
    """Write split and prior, which all rows share, into the current folder; without the validation split."""
    if not Path("artifacts/prior.json").is_file():
        split.run(params)
        held_out = SPLIT / "validation.parquet"
        pq.write_table(pq.read_table(held_out).slice(0, 0), held_out)
        prior.run(params)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.segmentation", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--data", type=Path, required=True, help="data.location, the folder of the pack")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs and results")
    parser.add_argument("--recipe", type=Path, nargs="+", default=[RECIPE], help=f"overlays; default: {RECIPE}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--epochs", type=int, default=13, help="default: %(default)s")
    parser.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW", default=list(ROWS), help="default: all")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="a Markdown file for the report")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    changes = {name: {"epochs": options.epochs} for name in ("teacher", "student")}
    params = merged(recipe_params(options.recipe, options.data), changes)
    work = options.work / sha256_of_json(params.model_dump(mode="json", include=SECTIONS))[:12]
    output = options.output.absolute() if options.output else None
    work.mkdir(parents=True, exist_ok=True)
    needs_teacher = any(ROWS[name][1] == "student" for name in options.rows)
    names = [name for name in ROWS if name in options.rows or (needs_teacher and name == TEACHER)]
    with contextlib.chdir(work):
        prepare(params)
        classes = load_prior()
        runs = [{name: measure(name, merged(params, {"seed": seed})) for name in names} for seed in options.seeds]
    results = {name: [of_seed[name] for of_seed in runs] for name in names}
    stage = params.student
    report = (
        f"`python -m benchmarks.segmentation {shlex.join(arguments or sys.argv[1:])}`\n\n"
        f"{stage.backbone}, {options.epochs} epochs of batches of {stage.batch_size}; seeds "
        f"{', '.join(map(str, options.seeds))}; last epoch. {hardware('cpu')}, {versions(options.threads)}.\n\n"
        f"{table(results, classes.groups)}\nDifferences paired by seed, with the 95 % interval of Student's t:\n\n"
        f"{differences(results)}\nmIoU / mAcc of one network at the strengths that it can be served with, "
        f"by the alpha that it then acts like (alpha = 1 - strength):\n\n"
        f"{curve(results)}\nIoU by class, as trained:\n\n{by_class(results, classes.classes)}"
    )
    publish(report, output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
