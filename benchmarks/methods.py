"""Markdown table of a comparison of methods, for docs/results.md; with --steps, cost of a step and the cost goals.

    tailor methods compare --methods all --seeds 3
    python -m benchmarks.methods comparison/comparison.json
    python -m benchmarks.methods --steps

Percent; an interval of the differences is in brackets. Cost: trained images of one seed with the teacher, in thousands, and
multiply-accumulates relative to the first method.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

MEASURES = ("all", "many", "medium", "few")


def table(content: dict[str, Any]) -> str:
    """Return the table. content: comparison.json."""
    reference = content["reference"]
    heads = [*MEASURES, "ECE", f"all, against {reference}", "images trained, k", "MACs", "s a run"]
    lines = [f"| method | {' | '.join(heads)} |", "|---|" + "--:|" * len(heads)]
    rows = content["methods"]
    base = next((row["cost"]["macs"] for row in rows if row["cost"]), None)
    for row in rows:
        cells = [_percent(row["accuracy"][name]["value"]) for name in MEASURES]
        cells += [_percent(row["ece"]["mean"]), _difference(row["difference"].get("all"))]
        cost = row["cost"]
        cells += [f"{cost['trained'] / 1000:,.0f}", f"{cost['macs'] / base:.2f}"] if cost and base else ["", ""]
        lines.append(f"| `{row['method']}` | {' | '.join(cells)} | {row['seconds']:,.0f} |")
    counts, images = (
        content["classes"],
        f"{content['training_images']:,} training and {content['test_images']:,} test images",
    )
    groups = ", ".join(f"{counts[name]} {name}" for name in MEASURES[1:])
    return (
        f"`{content['command']}`\n\n{images}; classes: {groups}; seeds {', '.join(map(str, content['seeds']))}.\n\n"
        + "\n".join(lines)
        + "\n"
    )


def _percent(share: float | None) -> str:
    return "n/a" if share is None else f"{100 * share:.1f}"


def _difference(estimate: dict[str, float] | None) -> str:
    if estimate is None or estimate["value"] is None:
        return ""
    value, low, high = (f"{100 * estimate[key]:+.1f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("comparison", type=Path, nargs="?", help="comparison.json of `tailor methods compare`")
    what.add_argument("--steps", action="store_true", help="measure a step of each contrast method (minutes)")
    options = parser.parse_args(arguments)
    if options.steps:
        from benchmarks.method_steps import report

        print(report(), end="")
        return 0
    print(table(json.loads(options.comparison.read_text(encoding="utf-8"))), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
