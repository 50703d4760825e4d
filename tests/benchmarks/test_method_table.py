"""The table of a comparison of methods: the columns at equal cost and the sentence on the place of a method."""

from __future__ import annotations

import json
import statistics

import pytest
import scipy.stats

from benchmarks.method_seeds import join
from benchmarks.methods import main, place, table


def row(name: str, share: float, behind: tuple[float, float, float] | None, epochs: int = 10) -> dict:
    interval = {"value": share, "low": share - 0.01, "high": share + 0.01}
    return {
        "method": name, "accuracy": dict.fromkeys(("all", "many", "medium", "few"), interval), "ece": {"mean": 0.1},
        "difference": {}, "behind": dict(zip(("value", "low", "high"), behind, strict=True)) if behind else None,
        "cost": {"trained": 2000, "macs": 100}, "seconds": 3.0, "epochs": epochs,
    }  # fmt: skip


CASES = {
    "gml is first; bcl, the second, is at -1.0 (-2.0 to +0.1) points from it.": [
        row("gml", 0.5, None), row("bcl", 0.49, (-0.01, -0.02, 0.001)), row("kd", 0.4, (-0.1, -0.2, -0.05)),
    ],
    "gml is not first but within the spread of the first, bcl: -1.0 (-2.0 to +0.0) points, place 2 of 2.": [
        row("gml", 0.49, (-0.01, -0.02, 0.0)), row("bcl", 0.5, None),
    ],
    "gml is neither first nor within its spread, bcl: -3.0 (-4.0 to -2.0) points, place 3 of 3.": [
        row("gml", 0.47, (-0.03, -0.04, -0.02)), row("bcl", 0.5, None), row("kd", 0.49, (-0.01, -0.02, 0.0)),
    ],
    "gml is not first and has no seed in common with the first, bcl.": [row("gml", 0.4, None), row("bcl", 0.5, None)],
    "gml has no result.": [row("bcl", 0.5, None)],
}  # fmt: skip


@pytest.mark.parametrize("sentence", CASES)
def test_the_sentence_says_plainly_whether_a_method_is_first(sentence: str) -> None:
    assert place(CASES[sentence], "gml") == sentence


def test_the_table_has_a_column_at_equal_cost_beside_equal_epochs() -> None:
    content = {
        "command": "tailor methods compare", "reference": "bcl", "classes": dict.fromkeys(("many", "medium", "few"), 1),
        "training_images": 9, "test_images": 8, "seeds": [0], "complete": False,
        "methods": [row("bcl", 0.5, None), row("gml", 0.52, (0.0, 0.0, 0.0))],
        "equal_cost": {"method": "gml", "methods": [row("gml", 0.61, None, 10), row("bcl", 0.6, (-0.01, -0.02, 0.0), 37)]},
    }  # fmt: skip
    lines = table(content).splitlines()
    head, bcl = (
        next(line for line in lines if line.startswith(start)).split(" | ") for start in ("| method", "| `bcl`")
    )
    assert len(head) == len(bcl)
    at = head.index("epochs at equal cost")
    assert bcl[at : at + 2] == ["37", "60.0 (59.0 to 61.0)"]
    assert lines[-2].startswith("At the cost of gml gml is first; bcl") and lines[-1].startswith("Not complete")


def comparison(seeds: list[int], values: dict[str, list[float]], **changes: object) -> dict:
    """A comparison.json of these seeds. values: method → accuracy of each seed."""
    methods = [
        row(name, statistics.fmean(shares), None) | {"seeds": seeds, "by_seed": {"all": shares, "many": shares}}
        for name, shares in values.items()
    ]
    return {
        "command": "tailor methods compare", "reference": "bcl", "classes": {"many": 1, "medium": 0, "few": 0},
        "training_images": 9, "test_images": 8, "seeds": seeds, "complete": True, "methods": methods, "equal_cost": None,
    } | changes  # fmt: skip


def test_comparisons_of_other_seeds_are_joined_with_intervals_over_all_seeds(tmp_path, capsys) -> None:
    parts = [
        comparison([0, 1], {"bcl": [0.50, 0.52], "gml": [0.55, 0.56]}),
        comparison([7], {"bcl": [0.51], "gml": [0.53], "kd": [0.4]}),
    ]
    joined = join(parts)
    assert joined["seeds"] == [0, 1, 7] and joined["complete"]
    bcl, gml = joined["methods"]
    values = [0.50, 0.52, 0.51], [0.55, 0.56, 0.53]
    for found, expected in (
        (gml["difference"]["all"], scipy.stats.ttest_rel(values[1], values[0])),
        (bcl["behind"], scipy.stats.ttest_rel(values[0], values[1])),
        (gml["accuracy"]["all"], scipy.stats.ttest_1samp(values[1], 0)),
    ):
        assert [found["low"], found["high"]] == pytest.approx(list(expected.confidence_interval()))
    assert gml["behind"] is None and bcl["difference"] == {} and gml["accuracy"]["few"]["value"] is None
    paths = [tmp_path / f"{number}.json" for number in range(2)]
    for path, part in zip(paths, parts, strict=True):
        path.write_text(json.dumps(part))
    assert main([str(path) for path in paths]) == 0
    printed = capsys.readouterr().out
    assert "seeds 0, 1, 7; intervals over seeds alone" in printed and "| `gml` | 54.7 (50.9 to 58.5)" in printed
    assert printed.endswith("Not in every file, so left out: kd.\n")
    with pytest.raises(SystemExit, match="2"):
        main([str(paths[0])] * 2)
    assert "seeds 0, 1, 0, 1: one stands in two files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_images": 7}, "test_images is 7, and 8 in the first file"),
        ({"reference": "gml"}, "reference is gml, and bcl"),
        ({"equal_cost": {"method": "gml", "methods": []}}, "--equal-cost is"),
    ],
)
def test_comparisons_of_other_projects_are_not_joined(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        join([comparison([0], {"bcl": [0.5]}), comparison([1], {"bcl": [0.5]}, **changes)])


def test_a_method_with_other_epochs_is_not_joined() -> None:
    parts = [comparison([seed], {"bcl": [0.5]}) for seed in (0, 1)]
    parts[1]["methods"][0]["epochs"] = 20
    with pytest.raises(ValueError, match="epochs of bcl differ"):
        join(parts)


OLD = json.dumps(comparison([0], {"gml": [0.5]}) | {"methods": [{"method": "gml"}]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "no list `methods`"),
        ('{"equal_cost": null, "methods": 3}', "no list `methods`"),
        ('{"equal_cost": null, "methods": []}', "no key reference"),
        (OLD, "no key by_seed"),
        ("{", "Expecting"),
        ("null", "no list `methods`"),
        (None, "No such file"),
    ],
)
def test_another_file_is_refused_in_one_line(text: str | None, message: str, tmp_path, capsys) -> None:
    path = tmp_path / "comparison.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit, match="2"):
        main([str(path)])
    assert f"{path}: " in (error := capsys.readouterr().err) and message in error
