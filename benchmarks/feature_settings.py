"""Validation accuracy of settings of teacher and student on stored features; the test split is not reported.

    python -m benchmarks.feature_settings plankton --data DIR --size 112 \\
        --row teacher --row teacher teacher.batch_size=512 teacher.learning_rate=2 --row student student.adapter=32

A row is a network and changes of params. `teacher`: recipes/photographs-lite0.yaml. `adapter`: the student of GML_STUDENT
(benchmarks/encoder_projects.py) with L_cls alone. `student`: the same with L_GML against the teacher of the row. Columns as
in benchmarks.encoder_accuracy; differences to the first row are paired by seed, with their 95 % t interval. Finished networks
are stored in the project's folder runs/ and not trained again.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch
import yaml

from benchmarks.accuracy import format_difference, format_mean_std, merged
from benchmarks.encoder_accuracy import COLUMNS, measure
from benchmarks.encoder_projects import add_options, gml_params, prepare, project_folder, project_params
from benchmarks.encoder_rows import Features, Row, gml, l_cls, l_cls_adapter
from pipeline.data.class_prior import load_prior
from pipeline.features.stored import load_features
from pipeline.params import Params
from pipeline.shared.errors import ParamsError

NETWORKS = {"teacher": l_cls, "adapter": l_cls_adapter, "student": gml}


def row_of(text: Sequence[str]) -> tuple[Row, dict[str, Any]]:
    """Return a row and its changes of params from a network and `section.key=value`. Raises ValueError for other text."""
    network, *changes = text
    if network not in NETWORKS:
        raise ValueError(f"{network!r} is unknown; expected {', '.join(NETWORKS)}")
    nested: dict[str, Any] = {}
    for change in changes:
        path, equals, value = change.partition("=")
        *sections, key = path.split(".")
        if not equals or not sections:
            raise ValueError(f"{change!r}; expected section.key=value")
        part = nested
        for section in sections:
            part = part.setdefault(section, {})
        part[key] = yaml.safe_load(value)
    sections = ("teacher",) if network == "teacher" else ("teacher", "student")
    return Row(" ".join(text), NETWORKS[network], sections), nested


def changed(params: Params, network: str, changes: dict[str, Any]) -> Params:
    """Return the params of a row: the recipe, with GML_STUDENT for a student, and its changes."""
    return merged(params if network == "teacher" else gml_params(params), changes)


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown table of validation: percent, mean ± std over seeds; differences of `all` and `few` to the first row."""
    columns = [*COLUMNS, "images"]
    heads = [*columns[:-1], "images at train", "all, against the first", "few, against the first", "s a run"]
    lines = [f"| network | {' | '.join(heads)} |", "|---|" + "--:|" * len(heads)]
    first = next(iter(results.values()))
    for name, runs in results.items():
        cells = [format_mean_std([run["validation"][column] for run in runs]) for column in columns]
        for column in ("all", "few"):
            pairs = [
                (run["validation"][column], base["validation"][column]) for run, base in zip(runs, first, strict=True)
            ]
            known = runs is not first and all(None not in pair for pair in pairs)
            cells.append(format_difference([own - other for own, other in pairs]) if known else "")
        lines.append(f"| {name} | {' | '.join(cells)} | {statistics.median(run['seconds'] for run in runs):,.0f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.feature_settings",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    parser.add_argument("--row", nargs="+", action="append", required=True, metavar="TEXT", help="network and changes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    recipe = project_params(options.data_set, options.data, options.encoder, options.size, options.views)
    try:
        made = [(row_of(text), text[0]) for text in options.row]
        rows = [(row, changed(recipe, network, changes)) for (row, changes), network in made]
    except (ValueError, ParamsError) as error:
        parser.error(f"--row: {error}")
    folder = project_folder(options.work, options.data_set, recipe)
    prepare(recipe, folder)
    with contextlib.chdir(folder):
        splits = (load_features(recipe, split) for split in ("train", "validation", "test"))
        data = Features(*splits, load_prior())
        results = {}
        for row, params in rows:
            results[row.name] = [measure(row, merged(params, {"seed": seed}), data) for seed in options.seeds]
    print(f"`python -m benchmarks.feature_settings {shlex.join(arguments or sys.argv[1:])}`\n\n{table(results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
