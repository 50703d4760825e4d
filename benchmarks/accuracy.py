"""Test accuracy of several methods with the same data, network, epochs and seeds: last epoch, mean ± sample std.

    python -m benchmarks.accuracy recipes/cifar10-parquet-if100.yaml --data DIR    # the paper's size: for a GPU
    python -m benchmarks.accuracy recipes/cifar10-parquet-if100-cpu.yaml --data DIR --plus recipes/variants/plus-short.yaml

Methods, all with params.student's network, schedule and augmentation:
- cross-entropy: L_cls without logit adjustment, evaluated with its plain logits. balanced softmax: only L_cls of Eq. 6.
- gml: the student of the recipe, with the recipe's teacher.
- gml without ...: ablations, one term of the loss with weight 0; "without both" leaves L_cls.
- balanced softmax, 2.5 times the epochs: only L_cls, at about the cost of the GML student.
- gml + <switch>: a single switch of the plus recipe. plus: all switches.

Every finished run is stored under --work and not repeated, so an interrupted comparison resumes. Accuracies are for the
balanced target prior, those of cross-entropy for the training prior, to which its plain logits correspond. many, medium
and few are means over the classes of a group. The test split is read once per run, after the last epoch; it is not used
for any selection.
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
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.method_seeds import interval
from pipeline import prior, split, student, teacher
from pipeline.data.class_prior import load_prior
from pipeline.data.dataset import load_images
from pipeline.demo.baseline import classification_section
from pipeline.evaluation.network_metrics import network_logits, network_metrics
from pipeline.model_io.devices import choose_device
from pipeline.params import Params, parse_params, read_yaml
from pipeline.params.recipe import apply_recipe
from pipeline.shared.artifacts import sha256_of_json, write_file, write_json

PLUS = Path("recipes/variants/plus.yaml")
# Sections of params.yaml that affect the results of one seed.
SECTIONS = {"device", "engine", "data", "stream", "image", "prior", "teacher", "student", "evaluate"}
TARGET_PRIORS = {"cross-entropy": "train"}  # of the other methods: balanced
ABLATIONS = {
    "gml without contrast": {"beta": 0.0},
    "gml without distillation": {"alpha": 0.0},
    "gml without both": {"alpha": 0.0, "beta": 0.0},
}
LONGER = 2.5
COLUMNS = ("all", "many", "medium", "few")


def merged(params: Params, changes: dict[str, Any]) -> Params:
    """Return params with a nested mapping of changes applied, validated again."""

    def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
        for key, value in new.items():
            old[key] = merge(old[key], value) if isinstance(value, dict) and isinstance(old.get(key), dict) else value
        return old

    return parse_params(merge(params.model_dump(mode="json"), changes), Path("benchmarks.accuracy"))


def switch_changes(recipe: Path) -> dict[str, dict[str, Any]]:
    """Return the changes of a plus recipe by method name: one per switch, and all together under `plus`."""
    plus = read_yaml(recipe)
    augment = plus["student"].pop("augment")
    alone = {key: {"student": {key: value}} for key, value in plus["student"].items()}
    mix = {key: value for key, value in augment.items() if key.startswith("mix")}
    others = {key: value for key, value in augment.items() if not key.startswith("mix")}
    alone["mix"] = {"student": {"augment": mix}}
    alone |= {key: {"student": {"augment": {key: value}}} for key, value in others.items()}
    named = {f"gml + {name} {_value(change)}": change for name, change in alone.items()}
    return {**named, "plus": read_yaml(recipe)}


def _value(change: dict[str, Any]) -> str:
    while isinstance(change, dict):
        change = next(iter(change.values()))
    return str(change)


Trainer = Callable[[Params, Path, Path], Path]


def classification_alone(params: Params, adjustment: float, output: Path, longer: float = 1) -> Path:
    """Train the student's network with L_cls only, for `longer` times its epochs."""
    section = classification_section(params.student, adjustment)
    alone = params.model_copy(update={"teacher": section})
    teacher.run(merged(alone, {"teacher": {"epochs": round(longer * alone.teacher.epochs)}}), output)
    return output


def methods(plus: Path = PLUS) -> dict[str, Trainer]:
    """Return trainers by method name: (params of one seed, teacher folder, output folder) → folder of the network."""

    def student_trainer(change: dict[str, Any]) -> Trainer:
        def train(params: Params, teacher_folder: Path, output: Path) -> Path:
            student.run(merged(params, change), output, teacher_folder)
            return output

        return train

    return {
        "cross-entropy": lambda params, _, output: classification_alone(params, 0.0, output),
        "balanced softmax": lambda params, _, output: classification_alone(params, 1.0, output),
        f"balanced softmax, {LONGER} times the epochs": lambda params, _, output: classification_alone(
            params, 1.0, output, LONGER
        ),
        "teacher": lambda _params, teacher_folder, _output: teacher_folder,
        "gml": student_trainer({}),
        **{name: student_trainer({"student": change}) for name, change in ABLATIONS.items()},
        **{name: student_trainer(change) for name, change in switch_changes(plus).items()},
    }


def train_all(
    params: Params, trainers: dict[str, Trainer], names: list[str], seeds: list[int]
) -> dict[str, list[dict[str, Any]]]:
    """Return the metrics of each seed by method, read from the current folder if stored there, else after training."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for seed in seeds:
        seed_params = merged(params, {"seed": seed})
        teacher_folder = Path(f"runs/{seed}/teacher")
        for name in names:
            output = Path(f"runs/{seed}/{name.replace(' ', '-')}")
            result_file = output.with_name(f"{output.name}.json")
            if not result_file.is_file():
                needs_teacher = name == "teacher" or "gml" in name or name == "plus"
                if needs_teacher and not (teacher_folder / "model.safetensors").is_file():
                    teacher.run(seed_params, teacher_folder)
                print(f"seed {seed}, {name}", flush=True)
                started = time.perf_counter()
                folder = trainers[name](seed_params, teacher_folder, output)
                metrics = evaluate_on_test(seed_params, folder, TARGET_PRIORS.get(name, "balanced"))
                write_json(result_file, {**metrics, "seconds": time.perf_counter() - started})
            results[name].append(json.loads(result_file.read_text(encoding="utf-8")))
    return results


def evaluate_on_test(params: Params, folder: Path, target_prior: str) -> dict[str, Any]:
    """Return the metrics on the test split for the target prior, and the last validation accuracy."""
    device, test, classes = choose_device(params.device), load_images(params.data, params.image, "test"), load_prior()
    logits = network_logits(folder, folder.name, test, params.image, classes, device)
    last = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return {
        **network_metrics(logits, test.labels.numpy(), classes, params.evaluate)[target_prior],
        "validation_accuracy": last.get("validation_accuracy"),
    }


def table(results: dict[str, list[dict[str, Any]]], seeds: list[int]) -> str:
    """Markdown table, a row per method: mean ± std over seeds in percent, paired differences of `all` to 2 methods."""
    against = [name for name in ("balanced softmax", "gml") if name in results]
    heads = [*COLUMNS, *(f"all, against {name}" for name in against), "s a run"]
    lines = [f"| method | {' | '.join(heads)} |", "|---|" + "--:|" * len(heads)]
    for name, runs in results.items():
        cells = [format_mean_std([run[column] for run in runs]) for column in COLUMNS]
        for other in against:
            pairs = zip(runs, results[other], strict=True)
            cells.append("" if name == other else format_difference([run["all"] - its["all"] for run, its in pairs]))
        seconds = statistics.median(run["seconds"] for run in runs)
        took = "" if name == "teacher" else f"{seconds:,.0f}"
        lines.append(f"| {name} | {' | '.join(cells)} | {took} |")
    return (
        "\n".join(lines)
        + f"\n\nSeeds {', '.join(map(str, seeds))}; last epoch; target prior balanced, of cross-entropy train; percent; "
        "mean ± sample standard deviation; differences seed by seed with their 95 % t interval.\n"
    )


def format_difference(values: list[float]) -> str:
    """Format the mean difference over seeds in percent, with the 95 % interval of Student's t."""
    if len(values) < 2:
        return f"{100 * values[0]:+.2f}"
    mean, low, high = (f"{100 * value:+.2f}" for value in interval(values).values())
    return f"{mean} ({low} to {high})"


def format_mean_std(values: list[float | None]) -> str:
    """Format mean ± sample standard deviation in percent; n/a for an empty group."""
    if any(value is None for value in values):
        return "n/a"
    mean = f"{100 * statistics.fmean(values):.2f}"
    return f"{mean} ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else mean


def comparison_id(params: Params, plus: Path) -> str:
    """Return the folder name of a comparison: a hash of SECTIONS and of the plus recipe."""
    recipe = {"params": params.model_dump(mode="json", include=SECTIONS), "plus": read_yaml(plus)}
    return sha256_of_json(recipe)[:12]


def recipe_params(recipes: list[Path], data: Path | None) -> Params:
    """Return params.yaml with the recipes. data: value of data.location; None for the location in the recipes."""
    text, _ = apply_recipe(recipes, Path("params.yaml"))
    params = parse_params(yaml.safe_load(text), recipes[-1])
    location = Path(os.path.relpath(data)) if data else Path(params.data.location)
    return merged(params, {"data": {"location": str(location.absolute())}})


def comparison_folder(params: Params, plus: Path, work: Path) -> Path:
    """Return the folder of a comparison under `work`. It contains split and prior, which all runs share."""
    folder = work / comparison_id(params, plus)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.chdir(folder):
        if not Path("artifacts/prior.json").is_file():
            split.run(params)
            prior.run(params)
    return folder


def publish(report: str, output: Path | None) -> None:
    """Print a report, and write it to the file `output` unless that is None."""
    print(report)
    if output:
        write_file(output, report)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path, nargs="+", help="overlays of recipes/, in order")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="some of them (default: all)")
    parser.add_argument("--plus", type=Path, default=PLUS, help="the plus recipe (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="data.location, the folder of the image files")
    parser.add_argument("--work", type=Path, default=Path("build/accuracy"), help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--output", type=Path, help="a Markdown file for the table")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    params = recipe_params(options.recipe, options.data)
    trainers = methods(options.plus)
    if unknown := set(options.methods or trainers) - set(trainers):
        parser.error(f"--methods: {sorted(unknown)[0]!r} is unknown; expected {', '.join(trainers)}")
    work = comparison_folder(params, options.plus, options.work)
    output = options.output.absolute() if options.output else None
    names = [name for name in trainers if name in (options.methods or trainers)]
    with contextlib.chdir(work):
        results = train_all(params, trainers, names, options.seeds)
    device = choose_device(params.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    command = f"`python -m benchmarks.accuracy {shlex.join(arguments or sys.argv[1:])}`"
    report = f"{command}\n\n{where}, torch {torch.__version__}, Python {platform.python_version()}.\n\n"
    publish(report + table(results, options.seeds), output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
