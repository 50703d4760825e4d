"""benchmarks.swaps: a short run; its stretches cover all of the time since the first swap."""

from __future__ import annotations

from itertools import pairwise

import pytest

from benchmarks.swaps import UNLOADING, measure, report
from tests.serving.conftest import write_export
from tests.support.project import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.end_to_end]


def test_the_seconds_after_a_promotion_belong_to_the_swap(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    write_export(tmp_path / "export")
    stretches, requests = measure(tmp_path / "export", 2, 20.0, tmp_path)
    assert [stretch.kind for stretch in stretches] == ["swap", "quiet", "swap", "quiet"]
    for swap, quiet in zip(stretches[::2], stretches[1::2], strict=True):
        assert swap.end == quiet.start
        assert swap.end - swap.start > UNLOADING
        assert quiet.end - quiet.start == pytest.approx(swap.end - swap.start, rel=0.2)
    assert all(after.start - before.end < 0.5 for before, after in pairwise(stretches))
    text, _ = report("command", stretches, requests)
    assert "2 swaps of " in text and "3 versions responded" in text
    rows = [line.split("|") for line in text.splitlines() if line.startswith(("| quiet", "| swap"))]
    within = sum(stretches[0].start <= due < stretches[-1].end for due, _, _ in requests)
    assert abs(sum(int(row[2]) for row in rows) - within) <= 20  # tolerance: the copy of the export between two rounds
