"""A run's history as TensorBoard event files, for those who ask for them."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import ParamsError
from pipeline.history import History


def write_scalars(folder: Path, history: History) -> None:
    """Write every number of a history under its name, by epoch, as the one event file of `folder`.

    Raises ParamsError when tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        raise ParamsError(
            "engine.tensorboard is true, but tensorboard is missing; pip install 'tailor[monitor]'"
        ) from None
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(folder)) as writer:
        for record in history:
            for name, value in record.items():
                if name != "epoch":
                    writer.add_scalar(name, value, int(record["epoch"]))
