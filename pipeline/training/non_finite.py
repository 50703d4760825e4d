"""Loss sums of a run, detection of non-finite losses without waiting for the device, and the dump of a failed run."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from models.distributed import mean_over_ranks, rank_count
from pipeline.data.dataset import AnyImages
from pipeline.shared.artifacts import whole_folder, write_file, write_json
from pipeline.training.step import Step, StepInputs, own_rows

WINDOW = 64  # steps whose losses and inputs are stored
AHEAD = 16  # steps that the host may be ahead of the device


@dataclass(frozen=True)
class Failure:
    """The first step (0-based, in its epoch) with a loss part that is not finite, and the names of such parts."""

    step: int
    terms: list[str]


class NonFiniteMonitor:
    """Sums the losses of the steps of one epoch and detects the first step with a loss that is not finite.

    Both are computed on the device. On CUDA the host reads the result a few steps later from an asynchronous copy. It
    waits for the copy only if it is more than AHEAD steps ahead, when the device has enough work. On the CPU it reads
    the result at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.names: list[str] = []
        self.sums = torch.zeros(0, dtype=torch.float64, device=device)
        self.inputs: deque[tuple[int, StepInputs]] = deque(maxlen=WINDOW)
        self._recent = torch.zeros(WINDOW, 0, dtype=torch.float64, device=device)
        self._failed = torch.full((), -1, dtype=torch.int64, device=device)
        self._reports: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def begin(self, sums: dict[str, Tensor] | None = None) -> None:
        """Start an epoch, or resume one with the sums of its checkpoint."""
        self.names = list(sums or {})
        self.sums = torch.tensor([float(value) for value in (sums or {}).values()], dtype=torch.float64)
        self.sums = self.sums.to(self.device)
        self._recent = torch.zeros(WINDOW, len(self.names), dtype=torch.float64, device=self.device)
        self._failed.fill_(-1)
        self.inputs.clear()
        self._reports.clear()

    def add(self, step: int, inputs: StepInputs, parts: dict[str, Tensor]) -> Failure | None:
        """Add the losses of a step; returns a failure of this or an earlier step if one has been detected, else None."""
        if not self.names:
            self.begin({name: torch.zeros(()) for name in parts})
        values = torch.stack([parts[name] for name in self.names]).double()
        self.sums += values
        self._recent[step % WINDOW] = values
        first = (self._failed < 0) & ~values.isfinite().all()
        self._failed.copy_(torch.where(first, step, self._failed))
        self.inputs.append((step, inputs))
        if self.device.type != "cuda":
            return self._failure(int(self._failed))
        report = torch.empty((), dtype=torch.int64, pin_memory=True)
        report.copy_(self._failed, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._reports.append((report, event))
        failed = -1
        while self._reports and (len(self._reports) > AHEAD or self._reports[0][1].query()):
            report, event = self._reports.popleft()
            event.synchronize()
            failed = int(report)
        return self._failure(failed)

    def means(self, steps: int) -> dict[str, float]:
        """Means of the losses over `steps` steps and all ranks; waits for the device."""
        return {name: value.item() / steps for name, value in self.checkpoint_sums().items()}

    def checkpoint_sums(self) -> dict[str, Tensor]:
        """The sums so far, averaged over the ranks, for a checkpoint."""
        return dict(zip(self.names, mean_over_ranks(self.sums).unbind(), strict=True))

    def recent(self, step: int) -> list[dict[str, float]]:
        """The losses of up to WINDOW steps that end with `step`, oldest first."""
        rows = self._recent.tolist()
        first = max(0, step - WINDOW + 1, min((number for number, _ in self.inputs), default=0))
        return [
            {"step": number, **dict(zip(self.names, rows[number % WINDOW], strict=True))}
            for number in range(first, step + 1)
        ]

    def last_failure(self) -> Failure | None:
        """The failure of the epoch, or None; waits for the device."""
        return self._failure(int(self._failed))

    def _failure(self, step: int) -> Failure | None:
        if step < 0:
            return None
        row = self._recent[step % WINDOW].isfinite().tolist()
        return Failure(step, [name for name, finite in zip(self.names, row, strict=True) if not finite])


def dump_failure(
    folder: Path, failure: Failure, monitor: NonFiniteMonitor, step: Step, train: AnyImages, facts: dict[str, Any]
) -> None:
    """Write the data needed to find the images and the term of a failure and to repeat its step; replaces an older dump.

    failure.json: step, terms, facts, losses of the previous steps, sample ids of the batch. tensors.safetensors: the
    views of the batch that the networks received, uint8 [views,b,3,H,W], and the run's state when it stopped. With
    several ranks, only this rank's views, before any mix.
    """
    tensors = dict(step.state())
    content = {"step": failure.step + 1, "terms": failure.terms, **facts, "sample_ids": []}
    for number, inputs in monitor.inputs:
        if number == failure.step:
            content["sample_ids"] = [train.sample_ids[i] for i in inputs.chosen.tolist()]
            own = own_rows(inputs)
            pixels = train.pixels(own.chosen, own.draws) if train.images is None else None
            # Only this rank runs this function, so mix partners of other ranks cannot be gathered.
            mix = inputs.mix if rank_count() == 1 else None
            tensors["views"] = step.views(replace(inputs, pixels=pixels, mix=mix).to(step.device))[0]
    # JSON has no NaN, so such a value is written as text.
    content["recent"] = [
        {name: value if torch.isfinite(torch.tensor(value)) else str(value) for name, value in parts.items()}
        for parts in monitor.recent(failure.step)
    ]
    with whole_folder(folder) as partial:
        write_file(
            partial / "tensors.safetensors",
            safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}),
        )
        write_json(partial / "failure.json", content)
