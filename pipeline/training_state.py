"""How far a run is, and the whole of its state as one snapshot: whatever the next process needs to go on to the bit."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from models.ranks import mean_over_ranks
from pipeline.errors import StageError
from pipeline.history import History
from pipeline.resume import Snapshot
from pipeline.step import Step


@dataclass
class Position:
    """Epoch and step (0-based, the next to do), the epoch's order, its sums so far, the records of finished epochs."""

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


def snapshot_of(at: Position, step: Step, generator: torch.Generator, best: Best | None) -> Snapshot:
    """Everything of a run: objective, momentum, average, generators, order and sums of the epoch, the best network."""
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


def take_snapshot(snapshot: Snapshot, step: Step, generator: torch.Generator) -> tuple[Position, Best | None]:
    """Put a snapshot back into the step and the generators. Raises StageError when it is of another network."""
    tensors, state = snapshot.tensors, snapshot.state
    wrong = step.load_state(part(tensors, ("objective.", "momentum.", "average.")))
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
    """The tensors whose names begin with one of the prefixes."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)}


def check_same_everywhere(snapshot: Snapshot | None, device: torch.device, folder: Path | None) -> None:
    """Every rank must go on from the same step; hosts that do not share the run folder would not. Raises StageError."""
    found = -1.0 if snapshot is None else snapshot.state["epoch"] * 1e6 + snapshot.state["step"]
    place = torch.tensor(found, dtype=torch.float64)
    if mean_over_ranks(place.to(device)).item() != place.item():
        raise StageError(
            f"{folder}: processes find different checkpoints in it; put artifacts/ on a disk that all share"
        )
