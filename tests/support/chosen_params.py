"""The params that `tailor init` suggests for a folder of images."""

from __future__ import annotations

from pipeline.params import Params
from pipeline.preparation.first_params import suggest_params, write_text
from pipeline.preparation.folder_summary import FolderSummary
from tests.support.making import ROOT

TEMPLATE = (ROOT / "params.yaml").read_text(encoding="utf-8")


NO_OPTIONS = {"tested": None, "own_validation": False, "shorter": 32, "unreadable": []}


def folder_summary(counts: list[int], **changes: object) -> FolderSummary:
    """Return the result of `inspect_folder` for classes of the given sizes."""
    return FolderSummary([f"class {n}" for n in range(len(counts))], counts, **{**NO_OPTIONS, **changes})


def chosen_params(what: FolderSummary, gpu: bool = True) -> Params:
    """Return the params that `tailor init` would write for it."""
    return write_text(TEMPLATE, suggest_params(what, "data/source", gpu))[1]
