"""Print the comparison of two runs as tables on the terminal."""

from __future__ import annotations

from rich.table import Table

from pipeline.evaluation.run_comparison import Comparison
from serving.shared.terminal import Console, cell, counted


def show(found: Comparison, classes: int) -> None:
    """Print the measures, and the `classes` classes with the smallest p-values."""
    console = Console()
    before, after = cell(found.before), cell(found.after)
    within = f"{100 * found.confidence:g} % interval"
    table = Table(title=f"{after} against {before}: {counted(found.samples, 'test image')}, {found.target_prior} prior")
    _columns(table, "measure", before, after, "difference", within, "p")
    for name, measure in found.measures.items():
        table.add_row(
            f"{name} (few images)" if measure.too_few else name,
            _share(measure.champion), _share(measure.challenger), _points(measure.difference),
            _range(measure.low, measure.high), "n/a" if measure.mcnemar is None else f"{measure.mcnemar:.2g}",
        )  # fmt: skip
    console.print(table)
    for line in found.warnings:
        console.print(f"warning: {line}", soft_wrap=True, markup=False, highlight=False)
    changed = found.changed(classes)
    moved = sum(bool(row.won or row.lost) for row in found.classes)
    if changed:
        table = Table(title=f"classes: {moved:,} of {len(found.classes):,} changed, the surest {len(changed)} of them")
        _columns(table, "class", "group", "training images", before, after, "difference", within, "q")
        for row in changed:
            table.add_row(
                cell(row.name), row.group, f"{row.train_count:,}", _share(row.champion), _share(row.challenger),
                _points(row.difference), _range(row.low, row.high), f"{row.q:.2g}",
            )  # fmt: skip
        console.print(table)
    console.print(
        "Differences are in percentage points; of ece less is better. all: mean over classes, weighted by the target prior. "
        "p: McNemar's test; q: p corrected for the number of classes. "
        "Intervals are over test images: another seed of training differs by more.",
        highlight=False,
    )


def _columns(table: Table, first: str, *others: str) -> None:
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="left" if name == "group" else "right", overflow="fold")


def _share(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1%}"


def _points(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:+.1f}"


def _range(low: float | None, high: float | None) -> str:
    return "n/a" if low is None or high is None else f"{100 * low:+.1f} to {100 * high:+.1f}"
