"""Markdown table of a comparison of methods, for docs/results.md; with --steps, cost of a step and the cost goals.

    tailor methods compare --methods all --seeds 3 --equal-cost gml
    python -m benchmarks.methods comparison/comparison.json
    python -m benchmarks.methods monday.json tuesday.json     # other seeds of the same comparison
    python -m benchmarks.methods --steps

Percent; intervals are in brackets. `from the first`: paired difference from the highest accuracy. Cost: trained images of one
seed with the teacher, in thousands, and multiply-accumulates relative to the first method. `equal cost`: with as many epochs
as cost the multiply-accumulates of the method that --equal-cost names. Below the table stands where GML is (--of).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.method_seeds import SAME, join

MEASURES = ("all", "many", "medium", "few")
KEYS = (*SAME, "command", "seeds", "complete", "equal_cost")  # besides `methods`


def table(content: dict[str, Any], of: str = "gml") -> str:
    """Return the table and the place of method `of`. content: comparison.json."""
    equal = content["equal_cost"]
    heads = [*MEASURES, "ECE", "from the first", "images trained, k", "MACs", "s a run"]
    heads += [f"{head} at equal cost" for head in ("epochs", "all", "few", "from the first")] if equal else []
    lines = [f"| method | {' | '.join(heads)} |", "|---|" + "--:|" * len(heads)]
    rows, again = content["methods"], {row["method"]: row for row in equal["methods"]} if equal else {}
    base = next((row["cost"]["macs"] for row in rows if row["cost"]), None)
    for row in rows:
        cells = [
            _interval(row["accuracy"]["all"]),
            *(_percent(row["accuracy"][name]["value"]) for name in MEASURES[1:]),
        ]
        cells += [_percent(row["ece"]["mean"]), _difference(row["behind"])]
        cost = row["cost"]
        cells += [f"{cost['trained'] / 1000:,.0f}", f"{cost['macs'] / base:.2f}"] if cost and base else ["", ""]
        cells += [f"{row['seconds']:,.0f}", *(_at_equal_cost(again.get(row["method"])) if equal else [])]
        lines.append(f"| `{row['method']}` | {' | '.join(cells)} |")
    counts, images = (
        content["classes"],
        f"{content['training_images']:,} training and {content['test_images']:,} test images",
    )
    groups = ", ".join(f"{counts[name]} {name}" for name in MEASURES[1:])
    places = [f"At equal epochs {place(rows, of)}"]
    places += [f"At the cost of {equal['method']} {place(equal['methods'], of)}"] if equal else []
    alone = "; intervals over seeds alone" if content.get("files", 1) > 1 else ""
    missing = ["Not complete: some runs have no result."] if not content["complete"] else []
    missing += [f"Not in every file, so left out: {', '.join(lacking)}."] if (lacking := content.get("lacking")) else []
    return (
        f"`{content['command']}`\n\n{images}; classes: {groups}; seeds {', '.join(map(str, content['seeds']))}{alone}.\n\n"
        + "\n".join([*lines, "", *places, *missing])
        + "\n"
    )


def place(rows: list[dict[str, Any]], name: str) -> str:
    """Sentence on where a method is: first, within the spread of the first, or behind it. rows: of comparison.json.

    Within the spread: the interval of the paired difference from the method with the highest accuracy contains 0.
    """
    first = max(rows, key=lambda row: row["accuracy"]["all"]["value"], default=None)
    row = next((row for row in rows if row["method"] == name), None)
    if row is None or first is None:
        return f"{name} has no result."
    if row is first:
        others = [each for each in rows if each["behind"]]
        if not others:
            return f"{name} is the only method."
        second = max(others, key=lambda each: each["behind"]["value"])
        return f"{name} is first; {second['method']}, the second, is at {_difference(second['behind'])} points from it."
    if row["behind"] is None:
        return f"{name} is not first and has no seed in common with the first, {first['method']}."
    where = (
        "not first but within the spread of the first"
        if row["behind"]["high"] >= 0
        else "neither first nor within its spread"
    )
    better = sum(each["accuracy"]["all"]["value"] > row["accuracy"]["all"]["value"] for each in rows)
    return (
        f"{name} is {where}, {first['method']}: {_difference(row['behind'])} points, place {better + 1} of {len(rows)}."
    )


def _at_equal_cost(row: dict[str, Any] | None) -> list[str]:
    if row is None:
        return [""] * 4
    cells = [_interval(row["accuracy"]["all"]), _percent(row["accuracy"]["few"]["value"])]
    return [str(row["epochs"]), *cells, _difference(row["behind"])]


def _interval(estimate: dict[str, float | None]) -> str:
    value, low, high = (_percent(estimate[key]) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})" if value != "n/a" else value


def _percent(share: float | None) -> str:
    return "n/a" if share is None else f"{100 * share:.1f}"


def _difference(estimate: dict[str, float] | None) -> str:
    if estimate is None or estimate["value"] is None:
        return ""
    value, low, high = (f"{100 * estimate[key]:+.1f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _content(path: Path) -> dict[str, Any]:
    """Content of a comparison.json. Raises OSError and ValueError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{error}; expected comparison.json of `tailor methods compare`") from None
    rows = content.get("methods") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("no list `methods`; expected comparison.json of `tailor methods compare`")
    missing = [key for key in KEYS if key not in content] + ["by_seed"] * any("by_seed" not in row for row in rows)
    if missing:
        raise ValueError(
            f"no key {missing[0]}, as in a file of an older version; run `tailor methods compare` again, which trains only "
            "what is not finished"
        )
    return dict(content)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "comparison",
        type=Path,
        nargs="*",
        default=[],
        help="comparison.json of `tailor methods compare`; several: other seeds",
    )
    what.add_argument("--steps", action="store_true", help="measure a step of each contrast method (minutes)")
    parser.add_argument(
        "--of", default="gml", metavar="NAME", help="method whose place is stated (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if options.steps:
        from benchmarks.method_steps import report

        print(report(), end="")
        return 0
    contents = []
    for path in options.comparison:
        try:
            contents.append(_content(path))
        except (OSError, ValueError) as error:
            parser.error(f"{path}: {error}")
    try:
        content = contents[0] if len(contents) == 1 else join(contents)
    except ValueError as error:
        parser.error(f"{', '.join(map(str, options.comparison))}: {error}")
    print(table(content, options.of), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
