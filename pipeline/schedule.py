"""Learning rate by epoch."""

from __future__ import annotations

import math

from pipeline.params import ScheduleParams


def learning_rate(schedule: ScheduleParams, base: float, epoch: int, epochs: int) -> float:
    """Learning rate of a 0-based epoch out of `epochs`.

    Warm-up: base * (epoch+1) / warmup_epochs. `cosine`: base/2 * (1 + cos(pi * (e+1) / (E+1))), the official
    code's form. `steps`: times factor from each milestone's epoch on, as the paper states it.

    Rule `official`: warm-up and the stretch before each milestone last an epoch longer, as that code compares by <=. So
    epoch `warmup_epochs` overshoots to base * (w+1) / w, and the first lower rate is at epoch milestone + 1.
    """
    late = schedule.rule == "official"
    if schedule.warmup_epochs and epoch < schedule.warmup_epochs + late:
        return base * (epoch + 1) / schedule.warmup_epochs
    if schedule.kind == "cosine":
        return 0.5 * base * (1 + math.cos(math.pi * (epoch + 1) / (epochs + 1)))
    return base * schedule.factor ** sum(epoch >= milestone + late for milestone in schedule.milestones)
