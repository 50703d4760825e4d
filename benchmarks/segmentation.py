"""mIoU and mAcc on CamVid: cross-entropy, L_cls and L_cls + L_GML at prior strengths 0, 0.2 and 1 (Table 8, Fig. 2).

    python -m benchmarks.segmentation --data camvid-240.parquet --work runs/segmentation

The same network, steps, batches and learning rates for every row; the last step is evaluated, on the test split, with
the training split of the pack as published (its validation split, every second frame of one drive, is not used). The
rows of L_GML compare against the network of `L_cls 1` of the same seed (contrast_encoder teacher), so that their
training costs that of the teacher in addition. A finished row of a seed is stored in --work and not repeated.

Areas are stored for serving strengths from -1 to 1: a network trained with strength a and served at strength s acts like
one trained with a - s. The first table has strength 0, the output without any adjustment.
"""

from __future__ import annotations

import argparse
import io
import json
import shlex
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.accuracy import format_mean_std, publish
from benchmarks.machine import hardware, versions
from models.prior import adjust_logits, log_class_prior
from models.segmentation.contrast import CellContrast
from models.segmentation.metrics import Areas, pixel_groups
from models.segmentation.network import SegmentationModel, upsample
from models.segmentation.objective import SegmentationObjective, SegmentationWeights
from pipeline.augment import apply_crops, draw_crops
from pipeline.params import SegmentationAugmentParams
from pipeline.shared.artifacts import write_file
from pipeline.shared.host_memory import keep_freed_memory
from pipeline.training.optimiser import polynomial_rate

CLASSES = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STRENGTHS = (-1.0, -0.8, -0.6, -0.5, -0.4, -0.2, 0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)
HEIGHT, WIDTH = 120, 160  # of a test image
AUGMENT = SegmentationAugmentParams(scale=[WIDTH, HEIGHT], ratio=[0.75, 1.5], crop=[96, 128])
BATCH, RATE, DECAY, TAU_S = 8, 0.05, 5e-4, 0.05
QUEUE = {"queue_total": 2048, "queue_minimum": 92, "queries": 1024, "keys": 256, "projection_dim": 64}
TEST_BATCH = 8


@dataclass(frozen=True)
class Row:
    """A row of the table. beta: weight of L_GML; strength: of the prior in all its losses."""

    name: str
    strength: float = 0.0
    beta: float = 0.0
    linear: bool = False


ROWS = (
    Row("cross-entropy", linear=True),
    Row("L_cls 1", 1.0),
    Row("L_cls + L_GML 1", 1.0, beta=1.0),
    Row("L_cls 0.2", 0.2),
    Row("L_cls + L_GML 0.2", 0.2, beta=1.0),
    Row("L_cls 0", 0.0),
    Row("L_cls + L_GML 0", 0.0, beta=1.0),
)


@dataclass(frozen=True)
class Split:
    """Images uint8 [N,3,H,W] and label maps uint8 [N,H,W]."""

    images: Tensor
    labels: Tensor


def read_pack(path: Path, split: str) -> Split:
    """Decode the images and label maps of a split of the pack."""
    table = pq.read_table(path, columns=["image", "label_map"], filters=[("split", "==", split)]).to_pylist()

    def decoded(column: str) -> Tensor:
        return torch.from_numpy(np.stack([np.asarray(Image.open(io.BytesIO(row[column]))) for row in table]))

    return Split(decoded("image").permute(0, 3, 1, 2).contiguous(), decoded("label_map"))


def normalised(images: Tensor) -> Tensor:
    """uint8 [...,3,H,W] → float32 with the mean and deviation of ImageNet."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def train(row: Row, seed: int, data: Split, counts: np.ndarray, steps: int, teacher: SegmentationModel | None) -> Any:
    """Train the network of a row; returns it in evaluation mode, and the mean losses of the last tenth of the steps."""
    torch.manual_seed(seed)
    log_prior = torch.tensor(log_class_prior(counts), dtype=torch.float32)
    model = SegmentationModel("resnet20", len(counts), TAU_S, "linear" if row.linear else "cosine")
    contrast = None
    if row.beta:
        width = model.feature_dim
        contrast = CellContrast(width, width, counts.tolist(), prior_strength=row.strength, **QUEUE)
    weights = SegmentationWeights(beta=row.beta, adjustment=row.strength)
    objective = SegmentationObjective(model, log_prior, weights, contrast, teacher).train()
    objective.to(memory_format=torch.channels_last)  # with bfloat16, 1.8 times the speed on the CPU
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimiser = torch.optim.SGD(trained, RATE, momentum=0.9, weight_decay=DECAY)
    generator = torch.Generator().manual_seed(seed)
    order, losses = torch.empty(0, dtype=torch.int64), []
    for step in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(data.images), generator=generator)
        chosen, order = order[:BATCH], order[BATCH:]
        draws = draw_crops(BATCH, AUGMENT, generator)
        views, labels = apply_crops(data.images[chosen], data.labels[chosen], draws, AUGMENT, mean=MEAN)
        pixels = normalised(views[0]).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            parts = objective(pixels[None], labels, chosen)
        optimiser.param_groups[0]["lr"] = polynomial_rate(RATE, step, steps)
        optimiser.zero_grad()
        parts["loss"].backward()
        optimiser.step()
        losses.append({name: part.item() for name, part in parts.items()})
    late = losses[-max(1, steps // 10) :]
    return model.eval(), {name: statistics.mean(entry[name] for entry in late) for name in late[0]}


@torch.no_grad()
def evaluate(model: SegmentationModel, data: Split, log_prior: Tensor) -> dict[str, Areas]:
    """Areas on the label maps at their own size, for each serving strength: {"0.2": Areas, ...}."""
    areas = {f"{strength:g}": Areas.zero(len(log_prior)) for strength in STRENGTHS}
    for images, labels in zip(data.images.split(TEST_BATCH), data.labels.split(TEST_BATCH), strict=True):
        small = F.interpolate(images.float(), size=(HEIGHT, WIDTH), mode="bilinear").round().to(torch.uint8)
        logits = model(normalised(small)).logits
        for strength in STRENGTHS:
            adjusted = adjust_logits(logits, log_prior[:, None, None], strength)
            predicted = upsample(adjusted, *labels.shape[1:]).argmax(1)
            areas[f"{strength:g}"].add(predicted.numpy(), labels.numpy())
    return areas


def measure(row: Row, seed: int, options: argparse.Namespace, data: Split, test: Split) -> dict[str, Any]:
    """Train and evaluate a row, or read its stored result."""
    name = f"{row.name.replace(' ', '_')}-{options.steps}-{seed}"
    stored, weights = options.work / f"{name}.json", options.work / f"{name}.safetensors"
    if stored.exists():
        return json.loads(stored.read_text(encoding="utf-8"))
    counts = np.bincount(data.labels.flatten(), minlength=256)[: len(CLASSES)]
    teacher = None
    if row.beta:
        teacher = SegmentationModel("resnet20", len(CLASSES), TAU_S)
        teacher.load_state_dict(load_file(options.work / f"L_cls_1-{options.steps}-{seed}.safetensors"))
    start, work = time.perf_counter(), time.process_time()
    model, losses = train(row, seed, data, counts, options.steps, teacher)
    seconds = time.perf_counter() - start, time.process_time() - work
    areas = evaluate(model, test, torch.tensor(log_class_prior(counts), dtype=torch.float32))
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, weights)
    result = {
        "row": row.name, "seed": seed, "steps": options.steps, "seconds": seconds[0], "cpu_seconds": seconds[1],
        "losses": losses,
        "areas": {
            strength: [values.tolist() for values in (entry.intersection, entry.predicted, entry.labelled)]
            for strength, entry in areas.items()
        },
    }  # fmt: skip
    write_file(stored, json.dumps(result) + "\n")
    print(f"{name}: {metrics(result)} in {seconds[0]:.0f} s", flush=True)
    return result


def areas_of(result: dict[str, Any], strength: float = 0.0) -> Areas:
    """Areas of a stored result at a serving strength."""
    return Areas(*(np.array(values) for values in result["areas"][f"{strength:g}"]))


def metrics(result: dict[str, Any], strength: float = 0.0, groups: list[str] | None = None) -> dict[str, float]:
    """Metrics of a stored result, in 0..1."""
    return {name: value or 0.0 for name, value in areas_of(result, strength).metrics(groups).items()}


def table(results: dict[str, list[dict[str, Any]]], groups: list[str]) -> str:
    """Mean ± sample deviation over the seeds, of every row: the output without adjustment."""
    columns = ("miou", "macc", "aacc", "miou_many", "miou_medium", "miou_few", "macc_few")
    names = ("mIoU", "mAcc", "aAcc", "mIoU many", "mIoU medium", "mIoU few", "mAcc few")
    lines = [f"| trained with | {' | '.join(names)} | seeds |", "|---" * (len(columns) + 2) + "|"]
    for name, runs in results.items():
        values = [metrics(run, 0.0, groups) for run in runs]
        cells = (format_mean_std([entry[column] for entry in values]) for column in columns)
        lines.append(f"| {name} | {' | '.join(cells)} | {len(runs)} |")
    return "\n".join(lines) + "\n"


def curve(results: dict[str, list[dict[str, Any]]], strengths: dict[str, float]) -> str:
    """mIoU / mAcc of every row by effective strength (trained minus served), mean over the seeds."""
    effective = (2.0, 1.5, 1.0, 0.8, 0.6, 0.5, 0.4, 0.2, 0.0, -0.2, -0.5, -1.0)
    lines = ["| trained with | " + " | ".join(f"{value:g}" for value in effective) + " |"]
    lines.append("|---" * (len(effective) + 1) + "|")
    for name, runs in results.items():
        cells = []
        for value in effective:
            served = round(strengths[name] - value, 6)
            if f"{served:g}" not in runs[0]["areas"]:
                cells.append("")
                continue
            entries = [metrics(run, served) for run in runs]
            means = (100 * statistics.mean(entry[column] for entry in entries) for column in ("miou", "macc"))
            cells.append(" / ".join(f"{mean:.1f}" for mean in means))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def by_class(results: dict[str, list[dict[str, Any]]]) -> str:
    """IoU of each class without adjustment, mean over the seeds."""
    lines = [f"| trained with | {' | '.join(CLASSES)} |", "|---" * (len(CLASSES) + 1) + "|"]
    for name, runs in results.items():
        values = 100 * np.mean([areas_of(run).iou() for run in runs], axis=0)
        lines.append(f"| {name} | {' | '.join(f'{value:.1f}' for value in values)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.segmentation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [row.name for row in ROWS]
    parser.add_argument("--data", type=Path, required=True, help="the pack, a Parquet file")
    parser.add_argument("--work", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--steps", type=int, default=400, help="default: %(default)s")
    parser.add_argument("--rows", nargs="+", choices=names, metavar="ROW", default=names, help="default: all")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="a Markdown file for the report")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    options.work.mkdir(parents=True, exist_ok=True)
    data, test = read_pack(options.data, "train"), read_pack(options.data, "test")
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in options.rows}
    for seed in options.seeds:
        for row in ROWS:
            if row.name in options.rows:
                results[row.name].append(measure(row, seed, options, data, test))
    groups = pixel_groups(np.bincount(data.labels.flatten(), minlength=256)[: len(CLASSES)])
    report = (
        f"`python -m benchmarks.segmentation {shlex.join(arguments or sys.argv[1:])}`\n\n"
        f"{len(data.images)} training and {len(test.images)} test images at {WIDTH} x {HEIGHT}, crops of "
        f"{AUGMENT.crop[1]} x {AUGMENT.crop[0]}, {options.steps} steps of {BATCH}, bfloat16; seeds "
        f"{', '.join(map(str, options.seeds))}; last step. {hardware('cpu')}, {versions(options.threads)}.\n\n"
        f"{table(results, groups)}\nEffective strength (trained minus served), mIoU / mAcc:\n\n"
        f"{curve(results, {row.name: row.strength for row in ROWS})}\nIoU by class:\n\n{by_class(results)}"
    )
    publish(report, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
