"""Progress bars on stderr."""

from __future__ import annotations

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from serving.shared.terminal import Console


def progress_bar(quiet: bool = False, unit: str = "steps") -> Progress:
    """Progress bar with steps (or another unit) done and remaining time; shown on a terminal only, not if `quiet`."""
    console = Console(quiet=quiet)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)
