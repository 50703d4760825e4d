"""Planted label errors that `tailor data suspects` finds on the stored features of an encoder, beside cleanlab.

    python3 -m venv build/label-peers && build/label-peers/bin/pip install -r benchmarks/label-peers-requirements.txt
    python -m benchmarks.label_errors plankton --data DIR --size 112 --peers-python build/label-peers/bin/python

Of the training images, at most --most of a class (the tail stays whole), 5 % get the label of another class: drawn at random
(`random`), or the class whose mean feature is nearest to the image (`similar`). Both rankings get features and labels alone.
Precision: planted errors among the first hundred images whose label is of the shot group; the column before it is the highest
possible value. R-precision: the same among as many images as there are errors. Mean and sample standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.accuracy import format_mean_std
from benchmarks.encoder_projects import add_options, prepare, project_folder, project_params
from models.prior import GROUPS, shot_group
from pipeline.features.stored import load_features
from pipeline.labels.features import LabelledImages
from pipeline.labels.suspects import label_probabilities, label_scores
from pipeline.params import Params

SHARE, FIRST = 0.05, 100
PEER = Path(__file__).with_name("peers") / "cleanlab_scores.py"
KINDS = ("random", "similar")


@dataclass(frozen=True)
class Planted:
    """Features [N,D] of images, their labels with errors [N], and which of them are wrong, bool [N]."""

    features: Tensor
    labels: Tensor
    wrong: Tensor


def plant(features: Tensor, labels: Tensor, kind: str, most: int, seed: int) -> Planted:
    """Choose at most `most` images of each class and give a share of them another label; no class loses its last image."""
    generator, classes = torch.Generator().manual_seed(seed), int(labels.max()) + 1
    order = torch.randperm(len(labels), generator=generator)
    kept = torch.cat([order[labels[order] == label][:most] for label in range(classes)])
    features, true = features[kept].float(), labels[kept]
    wrong = torch.zeros(len(true), dtype=torch.bool)
    left, number = torch.bincount(true, minlength=classes), round(SHARE * len(true))
    for index in torch.randperm(len(true), generator=generator).tolist():
        if wrong.sum() < number and left[true[index]] > 1:
            wrong[index], left[true[index]] = True, left[true[index]] - 1
    given = true.clone()
    if kind == "random":
        given[wrong] = (true[wrong] + torch.randint(1, classes, (int(wrong.sum()),), generator=generator)) % classes
    else:
        unit = F.normalize(features, dim=1)
        means = torch.stack([F.normalize(unit[true == label].mean(0), dim=0) for label in range(classes)])
        cosines = unit[wrong] @ means.T
        given[wrong] = cosines.scatter(1, true[wrong][:, None], -1).argmax(1)
    return Planted(features, given, wrong)


def tailor_scores(planted: Planted) -> np.ndarray:
    """Score of each label as in `tailor data suspects`, [N]."""
    count, names = len(planted.labels), [str(label) for label in range(int(planted.labels.max()) + 1)]
    blank = [""] * count
    images = LabelledImages(planted.features, planted.labels, torch.arange(count), blank, blank, blank, names)
    return label_scores(label_probabilities(images)[0], planted.labels).numpy()


def cleanlab_scores(planted: Planted, python: Path) -> tuple[np.ndarray, str]:
    """Label quality [N] by cleanlab in its environment, and its version."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "input.npz", Path(folder) / "output.npz"
        np.savez(source, features=planted.features.numpy(), labels=planted.labels.numpy())
        subprocess.run([python, PEER, source, target], check=True, stdout=subprocess.DEVNULL)
        result = np.load(target)
        return result["quality"], str(result["version"])


def precisions(scores: np.ndarray, planted: Planted) -> dict[str, tuple[float, float, float]]:
    """Of each shot group of the given labels: highest possible precision, precision of the first hundred, R-precision."""
    labels, wrong = planted.labels.numpy(), planted.wrong.numpy()
    groups = np.array([shot_group(count) for count in np.bincount(labels)])[labels]
    result = {}
    for group in GROUPS:
        members = np.flatnonzero(groups == group)
        ordered = wrong[members[np.argsort(scores[members], kind="stable")]]
        errors = int(ordered.sum())
        if errors:
            result[group] = min(errors, FIRST) / FIRST, ordered[:FIRST].sum() / FIRST, ordered[:errors].mean()
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.label_errors", description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--most", type=int, default=120, help="images of a class (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="repetitions (default: %(default)s)")
    parser.add_argument("--peers-python", type=Path, help="Python of the environment with cleanlab")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    params = project_params(options.data_set, options.data, options.encoder, options.size, options.views)
    folder = project_folder(options.work, options.data_set, params)
    prepare(params, folder)
    peer = options.peers_python.absolute() if options.peers_python else None
    lines = _table(params, folder, options, peer)
    command = shlex.join(["python", "-m", "benchmarks.label_errors", *(arguments or sys.argv[1:])])
    print("\n".join([f"`{command}`", "", *lines]))
    return 0


def _table(params: Params, folder: Path, options: argparse.Namespace, peer: Path | None) -> list[str]:
    with contextlib.chdir(folder):
        train = load_features(params, "train")
    lines = [
        "| errors | ranking | group | possible, % | precision of the first 100, % | R-precision, % | seconds |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for kind in KINDS:
        rows: dict[str, list[tuple[dict[str, tuple[float, float, float]], float]]] = {}
        for seed in range(options.seeds):
            planted = plant(train.images[:, 0], train.labels, kind, options.most, seed)
            started = time.perf_counter()
            found = precisions(tailor_scores(planted), planted)
            rows.setdefault("Tailor", []).append((found, time.perf_counter() - started))
            if peer:
                started = time.perf_counter()
                scores, version = cleanlab_scores(planted, peer)
                seconds = time.perf_counter() - started
                rows.setdefault(f"cleanlab {version}", []).append((precisions(scores, planted), seconds))
        for name, results in rows.items():
            mean_seconds = np.mean([each for _, each in results])
            for group in GROUPS:
                values = np.array([found[group] for found, _ in results if group in found])
                if len(values):
                    texts = " | ".join(format_mean_std(column.tolist()) for column in values.T)
                    lines.append(f"| {kind} | {name} | {group} | {texts} | {mean_seconds:.0f} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
