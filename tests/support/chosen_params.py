"""The params that `tailor init` suggests for a folder of images."""

from __future__ import annotations

from pipeline.params import Params
from pipeline.preparation.first_params import Found, choices, write_text
from tests.support.making import ROOT

TEMPLATE = (ROOT / "params.yaml").read_text(encoding="utf-8")


NO_OPTIONS = {"tested": None, "own_validation": False, "shorter": 32, "unreadable": []}


def found(counts: list[int], **changes: object) -> Found:
    """Return the result of `look` for classes of the given sizes."""
    return Found([f"class {n}" for n in range(len(counts))], counts, **{**NO_OPTIONS, **changes})


def chosen_params(what: Found, gpu: bool = True) -> Params:
    """Return the params that `tailor init` would write for it."""
    return write_text(TEMPLATE, choices(what, "data/source", gpu))[1]
