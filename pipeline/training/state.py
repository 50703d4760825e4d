"""State of a run as a snapshot for bit-identical resume, and checks before and during a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from models.distributed import mean_over_ranks, rank_count
from pipeline.params import TrainingParams
from pipeline.shared.errors import ParamsError, StageError
from pipeline.training.history import History
from pipeline.training.resume import Snapshot
from pipeline.training.step import Step
from serving.shared.terminal import counted


@dataclass
class Position:
    """Position in a run: epoch and next step (0-based), the epoch's order, its loss sums so far, records of finished epochs."""

    epoch: int = 0
    step: int = 0
    order: Tensor | None = None
    sums: dict[str, Tensor] = field(default_factory=dict)
    history: History = field(default_factory=list)


@dataclass(frozen=True)
class Best:
    """The epoch (from 1) with the best validation accuracy so far, and its network's state on the CPU."""

    epoch: int
    accuracy: float
    weights: dict[str, Tensor]


def create_snapshot(at: Position, step: Step, generator: torch.Generator, best: Best | None) -> Snapshot:
    """Take a snapshot of a run: objective, optimiser, EMA, generators, order and loss sums of the epoch, the best network."""
    tensors = {
        **step.state(),
        **{f"sums.{name}": value for name, value in at.sums.items()},
        **{f"best.{name}": value for name, value in (best.weights if best else {}).items()},
        "generator": generator.get_state(),
        "torch_generator": torch.get_rng_state(),
        "order": at.order if at.order is not None else torch.empty(0, dtype=torch.int64),
    }
    if step.device.type == "cuda":
        tensors["cuda_generator"] = torch.cuda.get_rng_state(step.device)
    state = {
        "epoch": at.epoch,
        "step": at.step,
        "history": at.history,
        "sums": list(at.sums),
        "best": {"epoch": best.epoch, "accuracy": best.accuracy} if best else None,
    }
    return Snapshot(tensors, state)


def restore_snapshot(snapshot: Snapshot, step: Step, generator: torch.Generator) -> tuple[Position, Best | None]:
    """Restore a snapshot into the step and the generators. Raises StageError when it belongs to another network."""
    tensors, state = snapshot.tensors, snapshot.state
    wrong = step.load_state(part(tensors, ("objective.", "optimiser.", "average.")))
    if wrong:
        raise StageError(f"the checkpoint does not fit the network ({wrong[0]}); remove it and start again")
    generator.set_state(tensors["generator"])
    torch.set_rng_state(tensors["torch_generator"])
    if step.device.type == "cuda" and "cuda_generator" in tensors:
        torch.cuda.set_rng_state(tensors["cuda_generator"], step.device)
    order = tensors["order"] if len(tensors["order"]) else None
    sums = {name: tensors[f"sums.{name}"] for name in state["sums"]}
    best = None
    if state["best"]:
        weights = {name.removeprefix("best."): tensor for name, tensor in part(tensors, ("best.",)).items()}
        best = Best(state["best"]["epoch"], state["best"]["accuracy"], weights)
    return Position(state["epoch"], state["step"], order, sums, state["history"]), best


def part(tensors: dict[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors whose names start with one of the prefixes."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)}


def check_same_everywhere(snapshot: Snapshot | None, device: torch.device, folder: Path | None) -> None:
    """Raise StageError unless all ranks resume from the same step; hosts that do not share the run folder would differ."""
    progress = -1.0 if snapshot is None else snapshot.state["epoch"] * 1e6 + snapshot.state["step"]
    step = torch.tensor(progress, dtype=torch.float64)
    if mean_over_ranks(step.to(device)).item() != step.item():
        raise StageError(
            f"{folder}: processes find different checkpoints in it; put artifacts/ on a disk that all share"
        )


def check_batch(name: str, params: TrainingParams, samples: int) -> None:
    """Raise ParamsError when a batch of stage `name` cannot be filled or divided into ranks and micro-batches."""
    batch, ranks = params.batch_size, rank_count()
    if batch > samples:
        raise ParamsError(
            f"{name}.batch_size is {batch}, above the {samples} training images; lower it to at most {samples}"
        )
    if batch % ranks:
        raise ParamsError(f"{name}.batch_size is {batch}, which {ranks} processes cannot share; expected a multiple")
    parts, share = params.accumulate, batch // ranks
    # Batch norm cannot compute the variance of a single sample.
    if parts > 1 and (share % parts or share // parts < 2):
        raise ParamsError(
            f"{name}.accumulate is {parts}, into which a process's {share} images of a batch cannot be cut; "
            "expected a divisor that leaves at least 2 images a part"
        )


def non_finite_tensors(model: nn.Module) -> str | None:
    """Number of tensors of a network's state that are not finite, and the first of them, as text; None if all are finite."""
    state = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    finite = torch.stack([tensor.isfinite().all() for tensor in state.values()]).tolist()
    bad = [name for name, good in zip(state, finite, strict=True) if not good]
    return f"{len(bad)} of {len(state)} tensors are not finite, {bad[0]} the first" if bad else None


def replaced_elsewhere(record: dict[str, float]) -> str | None:
    """A line about images that other ranks replaced in an epoch, because only rank 0 prints; None if there were none."""
    count = record.get("images_replaced", 0)
    if not count:
        return None
    return (
        f"{counted(int(count), 'image')} could not be read by other processes; replaced by others of their class; "
        "run `dvc repro -f split` to leave them out"
    )
