"""Prediction sets and unknown images on the stored features of an encoder, against other scores and thresholds.

    python -m benchmarks.answer_quality plankton --data DIR --size 112 --others cifar10-test.parquet

A linear classifier is trained with L_cls on the stored features of the training images, its temperature and all scores are
fitted on the validation images as in `evaluate`, and measured on the test images. Each seed trains once more with other
batches, and chooses other classes to leave out.

Least weight of a class's own quantile: chosen on the validation images, each with the thresholds of all others, so that a class
has as many scores as it has in a release, less one. Halves would leave no class of this data the 9 images that its own quantile
needs. Criterion, stated before the first run: the smallest mean number of classes in a set under the prior `train` for which
the coverage of each shot group is at least the wanted one less a point; if none has it, the largest coverage of the worst
group. Seeds are averaged.

Sets (coverage 0.9): images of the shot group whose set has the right class, classes in fewer than half of their own sets, and
classes in a set. Standard: one threshold for the probability p(class | image), under the prior `train`. Others: thresholds
for the prevalence-adjusted probability, of all classes together, as served, and of each class alone.

Unknown: training without --left-out of the classes; AUROC of their test images, and of images of other packs (--others),
against the test images of the known classes, and the false alarms at which 95 % of the unknown images are detected (FPR95).
Both by the shot group of the predicted class. Served is the log-density under the training prior.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.accuracy import format_mean_std
from benchmarks.encoder_projects import add_options, prepare, project_folder, project_params
from models.calibration import fit_served_temperature
from models.decisions import SetThresholds, familiarity, members_of
from models.networks.memory import build_memory, log_mixture
from models.prior import GROUPS, log_class_prior, shot_group, softmax
from models.second_stage.fitting import Fit, TrainingFeatures
from models.second_stage.methods import RECIPES, train_linear
from pipeline.answers.prediction_sets import INTERPOLATION
from pipeline.data.stream_decoding import decode_exact
from pipeline.features.stored import load_features
from pipeline.model_io.encoder import load_encoder
from pipeline.params import Params

COVERAGE, TAU, BATCH = 0.9, 0.07, 64
LEAST_WEIGHTS, SLACK = (0.0, 0.25, 0.5, 0.75, 1.0), 0.01  # candidates of the choice, and its tolerance of coverage
Split = tuple[Tensor, Tensor]  # features [N,D] and labels [N]


@dataclass(frozen=True)
class Fitted:
    """Calibrated balanced logits [N,C] of features; counts [C] of the training images; features and labels of these."""

    logits: Mapping[str, np.ndarray]
    counts: np.ndarray
    train: Split


def fitted(splits: Mapping[str, Split], others: Mapping[str, Tensor], seed: int) -> Fitted:
    """Train the classifier on `train` and calibrate it on `validation`; logits of all splits and of other images."""
    features, labels = splits["train"]
    classes = int(labels.max()) + 1
    counts = np.bincount(labels.numpy(), minlength=classes)
    data = TrainingFeatures(features[:, None], labels, classes)
    log_prior = torch.from_numpy(log_class_prior(counts))
    head = train_linear(data, Fit(RECIPES["balanced_softmax"], seed, torch.device("cpu")), log_prior)
    images = {name: split[0] for name, split in splits.items() if name != "train"} | dict(others)
    with torch.no_grad():
        logits = {name: head(values.float()).double().numpy() for name, values in images.items()}
    calibration = fit_served_temperature(logits["validation"], splits["validation"][1].numpy())
    temperature = calibration.temperature if calibration else 1.0
    return Fitted({name: values / temperature for name, values in logits.items()}, counts, (features, labels))


def weight_rows(fit: Fitted, splits: Mapping[str, Split]) -> dict[float, dict[str, float]]:
    """Least weight → measure → value, on the validation images, each with the thresholds of all others; as `set_rows`.

    The temperature is that of all validation images: it is one number.
    """
    held, known = fit.logits["validation"], splits["validation"][1].numpy()
    balanced, q = softmax(held), fit.counts / fit.counts.sum()
    probabilities, own = softmax(held + np.log(q)), balanced[np.arange(len(known)), known]
    by_class = [own[known == c].tolist() for c in range(len(fit.counts))]
    right, size = {w: np.zeros(len(known)) for w in LEAST_WEIGHTS}, {w: np.zeros(len(known)) for w in LEAST_WEIGHTS}
    for image, label in enumerate(known):
        others = list(by_class)
        others[label] = own[(known == label) & (np.arange(len(known)) != image)].tolist()
        for weight in LEAST_WEIGHTS:
            thresholds = SetThresholds(others, weight).thresholds(COVERAGE, q)
            inside, _ = members_of(balanced[image : image + 1], probabilities[image : image + 1], thresholds)
            right[weight][image], size[weight][image] = inside[0, label], inside.sum()
    return {weight: _set_measures(fit.counts, known, right[weight], size[weight]) for weight in LEAST_WEIGHTS}


def chosen_weight(rows: Mapping[float, Mapping[str, float]]) -> float:
    """The least weight that the criterion of this module selects from the means over the seeds."""
    worst = {weight: min(row[group] for group in GROUPS if group in row) for weight, row in rows.items()}
    covered = [weight for weight, coverage in worst.items() if coverage >= COVERAGE - SLACK]
    return min(covered, key=lambda weight: rows[weight]["size"]) if covered else max(worst, key=lambda w: worst[w])


def _set_measures(counts: np.ndarray, labels: np.ndarray, right: np.ndarray, size: np.ndarray) -> dict[str, float]:
    """Coverage of all images under the prior `train` and of each shot group, classes below half, mean size.

    counts: training images, [C]. right, size: of the set of each image with these labels, [N].
    """
    classes, q = len(counts), counts / counts.sum()
    groups, images = np.array([shot_group(count) for count in counts]), np.bincount(labels, minlength=classes)
    covered, classes_in = (np.bincount(labels, values, classes) / np.maximum(images, 1) for values in (right, size))
    seen = images > 0
    return {
        "all": float(covered[seen] @ q[seen] / q[seen].sum()),
        **{group: float(covered[seen & (groups == group)].mean()) for group in GROUPS if (seen & (groups == group)).any()},
        "below half": float((covered[seen] < 0.5).mean()), "size": float(classes_in[seen] @ q[seen] / q[seen].sum()),
    }  # fmt: skip


def set_rows(fit: Fitted, splits: Mapping[str, Split]) -> dict[str, dict[str, float]]:
    """Kind of thresholds → measure → value, on the test images, for the prior `train` with the test images weighted to it."""
    held, known = fit.logits["validation"], splits["validation"][1].numpy()
    tested, labels = fit.logits["test"], splits["test"][1].numpy()
    classes, q = len(fit.counts), fit.counts / fit.counts.sum()
    scores = {
        "prevalence-adjusted": (softmax(held), softmax(tested)),
        "standard": tuple(softmax(z + np.log(q)) for z in (held, tested)),
    }
    rows = {}
    for name, kind, weight in (
        ("standard", "standard", 0.0), ("one threshold", "prevalence-adjusted", 0.0),
        ("served", "prevalence-adjusted", None), ("a threshold per class", "prevalence-adjusted", 1.0),
    ):  # fmt: skip
        own = scores[kind][0][np.arange(len(known)), known]
        source = SetThresholds([own[known == c].tolist() for c in range(classes)], INTERPOLATION)
        inside, _ = members_of(scores[kind][1], softmax(tested + np.log(q)), source.thresholds(COVERAGE, q, weight))
        rows[name] = _set_measures(fit.counts, labels, inside[np.arange(len(labels)), labels], inside.sum(1))
    return rows


def unknown_scores(fit: Fitted, images: Mapping[str, Tensor]) -> dict[str, dict[str, np.ndarray]]:
    """Score → images → familiarity [N], low for unknown images."""
    features, labels = fit.train
    classes, log_prior = len(fit.counts), np.log(fit.counts / fit.counts.sum())
    unit = F.normalize(features.float(), dim=1)
    means = F.normalize(torch.zeros(classes, unit.shape[1]).index_add(0, labels, unit), dim=1)
    memory = build_memory(features, labels, classes)
    share = torch.from_numpy(log_prior).float()
    scores: dict[str, dict[str, np.ndarray]] = {}
    for name, values in images.items():
        logits, cosines = fit.logits[name], F.normalize(values.float(), dim=1) @ means.T
        rows = [F.normalize(part.float(), dim=1) @ memory.rows.float().T for part in values.split(BATCH)]
        mixture = [
            (log_mixture(part, memory.log_share, memory.row_class, classes, TAU) + share).logsumexp(1) for part in rows
        ]
        found = {
            "served": familiarity(logits, log_prior),
            "energy, balanced": familiarity(logits, np.zeros(classes)),
            "maximum softmax": softmax(logits).max(1),
            "cosine to class means": cosines.amax(1).numpy(),
            "nearest training image": torch.cat([part.amax(1) for part in rows]).numpy(),
            "density of the mixture": torch.cat(mixture).numpy(),
        }
        for score, each in found.items():
            scores.setdefault(score, {})[name] = each
    return scores


def detection(known: np.ndarray, unknown: np.ndarray) -> tuple[float, float]:
    """AUROC of unknown images against known ones, and the share of known images at which 95 % of the unknown are detected.

    Scores are low for unknown images; equal scores count half, as in scikit-learn.
    """
    ordered = np.sort(known)
    below, equal = np.searchsorted(ordered, unknown, "left"), np.searchsorted(ordered, unknown, "right")
    threshold = np.sort(unknown)[int(np.ceil(0.95 * len(unknown))) - 1]
    return float(1 - (below + equal).mean() / 2 / len(known)), float((known <= threshold).mean())


def detection_rows(fit: Fitted, images: Mapping[str, Tensor]) -> dict[tuple[str, str], dict[str, tuple[float, float]]]:
    """(unknown images, score) → group of the predicted class → AUROC and FPR95. images: `test` has the known ones."""
    groups = np.array([shot_group(count) for count in fit.counts])
    predicted = {name: groups[fit.logits[name].argmax(1)] for name in images}
    result = {}
    for score, values in unknown_scores(fit, images).items():
        for name in images:
            if name == "test":
                continue
            by_group = {"all": detection(values["test"], values[name])}
            for group in GROUPS:
                known, unknown = (values[each][predicted[each] == group] for each in ("test", name))
                if min(len(known), len(unknown)) >= 20:
                    by_group[group] = detection(known, unknown)
            result[name, score] = by_group
    return result


def leave_out(splits: Mapping[str, Split], share: float, seed: int) -> tuple[dict[str, Split], Tensor]:
    """Splits without a share of the classes, numbered again; and the features of the test images of the classes left out."""
    classes = int(splits["train"][1].max()) + 1
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))
    kept = order[round(share * classes) :].sort().values
    number = torch.full((classes,), -1)
    number[kept] = torch.arange(len(kept))
    inner = {name: (x[number[y] >= 0], number[y][number[y] >= 0]) for name, (x, y) in splits.items()}
    features, labels = splits["test"]
    return inner, features[number[labels] < 0]


def features_of(path: Path, params: Params, most: int) -> Tensor:
    """Features [N,D] of at most `most` images of a Parquet file, drawn with seed 0, by the encoder of params."""
    assert params.encoder is not None
    column = pyarrow.parquet.read_table(path, columns=["image"]).column("image")
    chosen = np.sort(np.random.default_rng(0).permutation(len(column))[:most])
    encoder, section = load_encoder(params.encoder, params.image), params.encoder.model_copy(update={"views": 0})
    parts = []
    for start in range(0, len(chosen), BATCH):
        pixels = torch.stack(
            [decode_exact(column[int(i)].as_py(), params.image) for i in chosen[start : start + BATCH]]
        )
        with torch.inference_mode():
            parts.append(encoder.features(pixels, np.zeros((len(pixels), 32), np.uint8), params.image, section)[:, 0])
    return torch.cat(parts).float()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.answer_quality", description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--seeds", type=int, default=3, help="repetitions (default: %(default)s)")
    parser.add_argument("--left-out", type=float, default=0.2, help="share of the classes (default: %(default)s)")
    parser.add_argument("--others", type=Path, nargs="*", default=[], help="Parquet files of unknown images, in --data")
    parser.add_argument("--most", type=int, default=1000, help="images of each of --others (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    params = project_params(options.data_set, options.data, options.encoder, options.size, options.views)
    folder = project_folder(options.work, options.data_set, params)
    prepare(params, folder)
    with contextlib.chdir(folder):
        stored = {name: load_features(params, name) for name in ("train", "validation", "test")}
    splits = {name: (images.images[:, 0].float(), images.labels) for name, images in stored.items()}
    others = {path.stem: features_of(options.data / path, params, options.most) for path in options.others}
    print(f"`{shlex.join(['python', '-m', 'benchmarks.answer_quality', *(arguments or sys.argv[1:])])}`\n")
    for line in _tables(splits, others, options.seeds, options.left_out):
        print(line, flush=True)
    return 0


def _tables(splits: Mapping[str, Split], others: Mapping[str, Tensor], seeds: int, share: float) -> list[str]:
    weights: dict[float, list[dict[str, float]]] = {}
    sets: dict[str, list[dict[str, float]]] = {}
    detected: dict[tuple[str, str], list[dict[str, tuple[float, float]]]] = {}
    for seed in range(seeds):
        fit = fitted(splits, {}, seed)
        for weight, row in weight_rows(fit, splits).items():
            weights.setdefault(weight, []).append(row)
        for name, row in set_rows(fit, splits).items():
            sets.setdefault(name, []).append(row)
        inner, out = leave_out(splits, share, seed)
        images = {"test": inner["test"][0], "classes left out": out, **others}
        fit = fitted(inner, {name: values for name, values in images.items() if name != "test"}, seed)
        for key, by_group in detection_rows(fit, images).items():
            detected.setdefault(key, []).append(by_group)
    means = {w: {key: float(np.mean([row[key] for row in rows])) for key in rows[0]} for w, rows in weights.items()}
    lines = [
        *_set_table("least weight, validation", weights), "",
        f"chosen on validation: {chosen_weight(means):g}; served: {INTERPOLATION:g}", "", *_set_table("sets, test", sets),
    ]  # fmt: skip
    columns = [f"{measure}, {group}" for measure in ("AUROC", "FPR95") for group in ("all", *GROUPS)]
    lines += ["", f"| unknown images | score | {' | '.join(columns)} |", "|---|---|" + "--:|" * len(columns)]
    for (name, score), each in sorted(detected.items(), key=lambda item: item[0][0]):
        cells = [
            _cell([by_group[group][place] for by_group in each if group in by_group])
            for place in (0, 1) for group in ("all", *GROUPS)
        ]  # fmt: skip
        lines.append(f"| {name} | {score} | {' | '.join(cells)} |")
    return lines


def _set_table(title: str, by_name: Mapping[Any, list[dict[str, float]]]) -> list[str]:
    measures = ["all", *GROUPS, "below half"]
    lines = [f"| {title} | {' | '.join(measures)} | classes in a set |", "|---|--:|--:|--:|--:|--:|--:|"]
    for name, rows in by_name.items():
        cells = [_cell([row[key] for row in rows if key in row]) for key in measures]
        lines.append(f"| {name} | {' | '.join(cells)} | {_cell([row['size'] / 100 for row in rows])} |")
    return lines


def _cell(values: list[float]) -> str:
    return format_mean_std(values) if values else "–"


if __name__ == "__main__":
    sys.exit(main())
