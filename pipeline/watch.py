"""The look-out over a run: sums of the loss parts, and the first value that is not finite, without waiting for the device."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from models.ranks import mean_over_ranks
from pipeline.step import StepInputs

WINDOW = 64  # steps whose parts and inputs are remembered
AHEAD = 16  # steps that the host may be ahead of the device


@dataclass(frozen=True)
class Failure:
    """The first step (0-based, in its epoch) with a part that was not finite, and the names of such parts."""

    step: int
    terms: list[str]


class Watch:
    """Collects what the steps of one epoch give.

    Sums and the look-out live on the device. On CUDA the host learns of a failure a few steps later, from a copy that
    it never waits for unless it is AHEAD steps ahead, when the device has enough to do; on the CPU at once.
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
        """Start an epoch, or go on within one with the sums that were kept."""
        self.names = list(sums or {})
        self.sums = torch.tensor([float(value) for value in (sums or {}).values()], dtype=torch.float64)
        self.sums = self.sums.to(self.device)
        self._recent = torch.zeros(WINDOW, len(self.names), dtype=torch.float64, device=self.device)
        self._failed.fill_(-1)
        self.inputs.clear()
        self._reports.clear()

    def add(self, step: int, inputs: StepInputs, parts: dict[str, Tensor]) -> Failure | None:
        """Take in the parts of a step; a failure that has become known."""
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
        found = -1
        while self._reports and (len(self._reports) > AHEAD or self._reports[0][1].query()):
            report, event = self._reports.popleft()
            event.synchronize()
            found = int(report)
        return self._failure(found)

    def means(self, steps: int) -> dict[str, float]:
        """Means over `steps` steps and all ranks; waits for the device."""
        return {name: value / steps for name, value in zip(self.names, self._shared_sums().tolist(), strict=True)}

    def kept_sums(self) -> dict[str, Tensor]:
        """The sums so far, averaged over the ranks, to go on from."""
        return dict(zip(self.names, self._shared_sums().unbind(), strict=True))

    def recent(self, step: int) -> list[dict[str, float]]:
        """The parts of up to WINDOW steps that end with `step`, oldest first."""
        rows = self._recent.tolist()
        first = max(0, step - WINDOW + 1, min((number for number, _ in self.inputs), default=0))
        return [
            {"step": number, **dict(zip(self.names, rows[number % WINDOW], strict=True))}
            for number in range(first, step + 1)
        ]

    def last_failure(self) -> Failure | None:
        """The failure of the epoch, if there is one; waits for the device."""
        return self._failure(int(self._failed))

    def _shared_sums(self) -> Tensor:
        return mean_over_ranks(self.sums)

    def _failure(self, step: int) -> Failure | None:
        if step < 0:
            return None
        row = self._recent[step % WINDOW].isfinite().tolist()
        return Failure(step, [name for name, finite in zip(self.names, row, strict=True) if not finite])
