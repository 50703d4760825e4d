"""Learning rate by epoch."""

from __future__ import annotations

import math

from pipeline.params import ScheduleParams


def learning_rate(schedule: ScheduleParams, base: float, epoch: int, epochs: int) -> float:
    """Learning rate of a 0-based epoch out of `epochs`.

    Warm-up: base * (epoch+1) / warmup_epochs. `cosine`: base/2 * (1 + cos(pi * (e+1) / (E+1))), the official
    code's form. `steps`: times factor from each milestone's epoch on, as the paper states it.

    Rule `official`, of `steps` (the authors' CIFAR program): warm-up and the stretch before each milestone last an epoch
    longer, as that code compares by <=. So epoch `warmup_epochs` overshoots to base * (w+1) / w, and the first lower rate
    is at epoch milestone + 1. Of `cosine` (their ImageNet program): e and E are counted from the end of warm-up.
    """
    official, warmup = schedule.rule == "official", schedule.warmup_epochs
    late = official and schedule.kind == "steps"
    if warmup and epoch < warmup + late:
        return base * (epoch + 1) / warmup
    if schedule.kind == "cosine":
        first = warmup if official else 0
        return 0.5 * base * (1 + math.cos(math.pi * (epoch - first + 1) / (epochs - first + 1)))
    return base * schedule.factor ** sum(epoch >= milestone + late for milestone in schedule.milestones)
