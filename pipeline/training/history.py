"""Record of a run by epoch: a line per epoch, metrics.jsonl, TensorBoard event files."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.shared.errors import ParamsError, install_command

History = list[dict[str, float]]
METRICS, PRETRAINING = "metrics.jsonl", "pretraining.jsonl"  # epochs of a run, and of the pretraining before it


def epoch_line(record: dict[str, float], epochs: int) -> str:
    """Text line for one epoch."""
    parts = "  ".join(f"{key} {value:.4f}" for key, value in record.items() if key in ("loss", "tau_g"))
    value = validation_score(record)
    score = "" if value is None else f"  validation {value:.1%}"
    speed = f"lr {record['learning_rate']:.4f}  {record['images_per_second']:,.0f} images/s"
    return f"epoch {record['epoch']}/{epochs}  {parts}{score}  {speed}"


def validation_score(record: dict[str, float]) -> float | None:
    """Score of an epoch on the validation split: accuracy, or mIoU of task segmentation; None without such images."""
    return record.get("validation_accuracy", record.get("validation_miou"))


def as_jsonl(history: History) -> str:
    """History as JSON lines, one record per epoch."""
    return "".join(json.dumps(record) + "\n" for record in history)


def write_scalars(folder: Path, history: History) -> None:
    """Write all values of a history by epoch as the only TensorBoard event file of `folder`.

    Raises ParamsError when tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        raise ParamsError(
            f"engine.tensorboard is true, but tensorboard is missing; {install_command('monitor')}"
        ) from None
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(folder)) as writer:
        for record in history:
            for name, value in record.items():
                if name != "epoch":
                    writer.add_scalar(name, value, int(record["epoch"]))
