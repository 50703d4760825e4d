"""The table of a comparison of methods: the columns at equal cost and the sentence on the place of a method."""

from __future__ import annotations

import pytest

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


@pytest.mark.parametrize(("text", "message"), [("{}", "no key equal_cost"), ("{", "Expecting"), (None, "No such file")])
def test_another_file_is_refused_in_one_line(text: str | None, message: str, tmp_path, capsys) -> None:
    path = tmp_path / "comparison.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit, match="2"):
        main([str(path)])
    assert f"{path}: " in (error := capsys.readouterr().err) and message in error
