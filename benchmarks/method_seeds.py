"""Joins comparisons of methods that were made with other seeds, on other days or machines, to one.

The files hold no predictions, so the intervals are those of Student's t over the seeds. They leave out the spread of the test
images, which `tailor methods compare` includes.
"""

from __future__ import annotations

import statistics
from typing import Any

SAME = ("reference", "classes", "training_images", "test_images")


def join(contents: list[dict[str, Any]]) -> dict[str, Any]:
    """Content of one comparison.json with the seeds of all; contents: of files with the same data, methods and reference.

    A method that a file lacks, for instance because it diverged, is not in the result; key `lacking` has its name. Raises
    ValueError if files differ in a key of SAME, in --equal-cost, or in epochs or cost of a method, or if they share a seed.
    """
    first = contents[0]
    for other in contents[1:]:
        for key in SAME:
            if other[key] != first[key]:
                raise ValueError(
                    f"{key} is {other[key]}, and {first[key]} in the first file; expected the same project"
                )
    named = {content["equal_cost"] and content["equal_cost"]["method"] for content in contents}
    if len(named) > 1:
        raise ValueError(f"--equal-cost is {' and '.join(map(str, named))}; expected one in all files")
    seeds = [seed for content in contents for seed in content["seeds"]]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds {', '.join(map(str, seeds))}: one stands in two files; expected other seeds in each")
    equal = None
    if first["equal_cost"]:
        parts = [content["equal_cost"]["methods"] for content in contents]
        equal = {"method": first["equal_cost"]["method"], "methods": _joined(parts, first["reference"])}
    return {
        **first, "seeds": seeds, "files": len(contents), "equal_cost": equal,
        "complete": all(content["complete"] for content in contents), "lacking": _lacking(contents),
        "methods": _joined([content["methods"] for content in contents], first["reference"]),
    }  # fmt: skip


def _lacking(contents: list[dict[str, Any]]) -> list[str]:
    """Names of the methods that some file has, and not all."""
    names = [{row["method"] for row in content["methods"]} for content in contents]
    return sorted(set.union(*names) - set.intersection(*names))


def _joined(parts: list[list[dict[str, Any]]], reference: str) -> list[dict[str, Any]]:
    """Rows of the methods that every part has."""
    by_name = [{row["method"]: row for row in part} for part in parts]
    rows = [_row([part[name] for part in by_name]) for name in by_name[0] if all(name in part for part in by_name)]
    values = {row["method"]: dict(zip(row["seeds"], row["by_seed"]["all"], strict=True)) for row in rows}
    best = max(rows, key=lambda row: row["accuracy"]["all"]["value"], default=None)
    for row in rows:
        for key, other in (("difference", reference), ("behind", best and best["method"])):
            common = [seed for seed in row["seeds"] if seed in values.get(other, {})] if other != row["method"] else []
            found = interval([values[row["method"]][seed] - values[other][seed] for seed in common]) if common else None
            row[key] = ({"all": found} if found else {}) if key == "difference" else found
    return rows


def _row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One method from its rows in several files."""
    for key in ("epochs", "cost"):
        if any(row[key] != rows[0][key] for row in rows):
            raise ValueError(f"{key} of {rows[0]['method']} differ between the files; expected the same params.yaml")
    seeds = [seed for row in rows for seed in row["seeds"]]
    by_seed = {name: [value for row in rows for value in row["by_seed"][name]] for name in rows[0]["by_seed"]}
    empty = dict.fromkeys(("value", "low", "high"))
    return rows[0] | {
        "seeds": seeds, "by_seed": by_seed,
        "accuracy": {name: interval(by_seed[name]) if name in by_seed else empty for name in rows[0]["accuracy"]},
        "ece": {"mean": sum(row["ece"]["mean"] * len(row["seeds"]) for row in rows) / len(seeds)},
        "seconds": sum(row["seconds"] * len(row["seeds"]) for row in rows) / len(seeds),
    }  # fmt: skip


def interval(values: list[float]) -> dict[str, float]:
    """Mean, and its 95 % interval of Student's t; for one value the value three times."""
    import scipy.stats  # missing on a machine that only trains

    mean, count = statistics.fmean(values), len(values)
    half = scipy.stats.t.ppf(0.975, count - 1) * statistics.stdev(values) / count**0.5 if count > 1 else 0.0
    return {"value": mean, "low": mean - half, "high": mean + half}
