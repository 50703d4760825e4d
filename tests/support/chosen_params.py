"""The first params of a folder of images."""

from __future__ import annotations

from pipeline.params import Params
from pipeline.preparation.first_params import Found, choices, write_text
from tests.support.making import ROOT

TEMPLATE = (ROOT / "params.yaml").read_text(encoding="utf-8")


NO_OPTIONS = {"tested": None, "own_validation": False, "shorter": 32, "unreadable": []}


def found(counts: list[int], **changes: object) -> Found:
    """What `look` would find: classes of these sizes."""
    return Found([f"class {n}" for n in range(len(counts))], counts, **{**NO_OPTIONS, **changes})


def chosen_params(what: Found, gpu: bool = True) -> Params:
    """The params that init would write for it."""
    return write_text(TEMPLATE, choices(what, "data/source", gpu))[1]
