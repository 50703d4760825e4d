"""Print and write the result of `data check`: tables on the terminal; report.json, CSV files and long_tail.svg."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from models.prior import shot_group
from models.sample_size import ADVICE, warnings_of
from models.sample_size import as_json as sizes_as_json
from pipeline.data.assignment import SPLITS
from pipeline.data.inspection import SHOWN
from pipeline.preparation.check import DataReport
from pipeline.preparation.long_tail_chart import draw_long_tail, show_long_tail
from pipeline.shared.artifacts import as_csv, whole_folder, write_file, write_json
from serving.shared.terminal import Console, cell, counted


def print_report(report: DataReport, console: Console) -> None:
    """Print the report as text and tables."""
    console.print(f"[bold]{cell(report.source)}[/] at {cell(report.location)}", highlight=False)
    console.print(_split_table(report))
    if report.label_maps:
        console.print(report.label_maps.summary())
        console.print(report.label_maps.table())
    else:
        groups = ", ".join(f"{number:,} {group}" for group, number in report.groups().items())
        train = report.counts["train"]
        console.print(
            f"train: {counted(len(report.classes), 'class')} of {max(train):,} to {counted(min(train), 'image')}, imbalance "
            f"factor {report.imbalance_factor:.4g}; {groups}"
        )
        console.print(show_long_tail(train, report.classes))
    for line in _summary_lines(report):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    if report.published:
        console.print(_published_table(report))
    for name, value in (("list", report.list_hash), ("content", report.content_hash)):
        console.print(f"{name} hash {value}", soft_wrap=True, highlight=False)
    few = warnings_of(report.test_sizes())
    warnings = [*few, *([f"too few test images: {ADVICE}"] if few else [])]
    lines = {"note": report.remarks, "warning": warnings, "problem": report.problems, "error": report.verdict}
    for kind, texts in lines.items():
        for text in texts:
            console.print(f"{kind}: {text}", soft_wrap=True, markup=False, highlight=False)


def _split_table(report: DataReport) -> Table:
    table = Table()
    for column in ("split", "images", "classes", "bytes"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split in SPLITS:
        rows = report.assigned[split]
        size = sum(report.inspected[row.reference].size for row in rows)
        classes = sum(count > 0 for count in report.counts[split])
        table.add_row(split, f"{len(rows):,}", f"{classes:,}", f"{size:,}")
    return table


def _summary_lines(report: DataReport) -> list[str]:
    missing = report.count_missing()
    lines = [f"missing: {missing:,}; unreadable: {len(report.bad) - missing:,}"]
    lines += [f"  {report.inspected[row.reference].problem}" for row in report.bad[:SHOWN]]
    if len(report.bad) > SHOWN:
        lines.append(f"  and {len(report.bad) - SHOWN:,} more, in problems.csv")
    for kind, groups in (("exact", list(report.duplicates.values())), ("near", report.near_duplicates)):
        if groups is not None:
            across = report.across_splits(groups)
            lines.append(f"{kind} duplicates: {counted(len(groups), 'group')}, {across:,} of them across splits")
    if report.conflicts:
        lines.append(f"the same image with two labels in one split: {len(report.conflicts):,}")
    sizes = ", ".join(f"{name} {width}x{height}" for name, (width, height) in report.image_sizes().items())
    return [*lines, f"image sizes: {sizes or 'none'}"]


def _published_table(report: DataReport) -> Table:
    table = Table(title=f"{report.source} as published")
    for column in ("figure", "published", "measured", ""):
        table.add_column(column, justify="left" if column in ("figure", "") else "right")
    for figure in report.published:
        table.add_row(
            figure.figure, figure.published, figure.measured, "same" if figure.same else "[bold red]differs[/]"
        )
    return table


def write_report(report: DataReport, folder: Path) -> None:
    """Write the report's files to a folder, which is replaced atomically."""
    with whole_folder(folder) as output:
        write_json(output / "report.json", as_json(report))
        write_file(output / "classes.csv", _classes_csv(report))
        problems = [
            (row.split, row.sample_id, report.classes[row.label], str(report.inspected[row.reference].problem))
            for row in report.bad
        ]
        write_file(output / "problems.csv", as_csv(problems, ["split", "sample_id", "class", "problem"]))
        duplicates = {"duplicates": report.duplicates.values(), "near_duplicates": report.near_duplicates or []}
        for name, groups in duplicates.items():
            members = [
                (str(number), split, row.sample_id, report.classes[row.label])
                for number, group in enumerate(groups)
                for split, row in group
            ]
            write_file(output / f"{name}.csv", as_csv(members, ["group", "split", "sample_id", "class"]))
        if not report.label_maps:
            images, number = (
                counted(sum(report.counts["train"]), "training image"),
                counted(len(report.classes), "class"),
            )
            draw_long_tail(report.counts["train"], f"{report.source}: {images}, {number}", output / "long_tail.svg")


def _classes_csv(report: DataReport) -> str:
    """Training, validation and test images of each class; for task segmentation its pixels and images."""
    if maps := report.label_maps:
        rows = [
            (name, *(str(numbers[split][c]) for numbers in (maps.pixels, maps.images) for split in SPLITS))
            for c, name in enumerate(maps.classes)
        ]
        columns = [f"{split}_{unit}" for unit in ("pixels", "images") for split in SPLITS]
        return as_csv(rows, ["class", *columns])
    classes = [
        (name, *(str(report.counts[split][c]) for split in SPLITS), shot_group(report.counts["train"][c]))
        for c, name in enumerate(report.classes)
    ]
    return as_csv(classes, ["class", *SPLITS, "group"])


def as_json(report: DataReport) -> dict[str, Any]:
    """The report as JSON-serialisable values."""
    exact, near = list(report.duplicates.values()), report.near_duplicates
    missing = report.count_missing()
    return {
        "source": report.source,
        "location": report.location,
        "images": {split: len(report.assigned[split]) for split in SPLITS},
        "classes": len(report.classes),
        "largest_class": max(report.counts["train"]),
        "smallest_class": min(report.counts["train"]),
        "imbalance_factor": report.imbalance_factor,
        "groups": report.groups(),
        "missing": missing,
        "unreadable": len(report.bad) - missing,
        "duplicate_groups": len(exact),
        "duplicate_groups_across_splits": report.across_splits(exact),
        "images_under_two_labels": len(report.conflicts),
        "near_duplicate_groups": None if near is None else len(near),
        "near_duplicate_groups_across_splits": None if near is None else report.across_splits(near),
        "image_sizes": {name: list(size) for name, size in report.image_sizes().items()},
        "list_hash": report.list_hash,
        "content_hash": report.content_hash,
        "published": [
            {"figure": figure.figure, "published": figure.published, "found": figure.measured, "same": figure.same}
            for figure in report.published
        ],
        "test_images": sizes_as_json(report.test_sizes()),
        "warnings": warnings_of(report.test_sizes()),
        "remarks": report.remarks,
        "problems": report.problems,
        "verdict": report.verdict,
        **({"label_maps": report.label_maps.as_json()} if report.label_maps else {}),
    }
