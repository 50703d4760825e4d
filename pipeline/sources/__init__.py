"""Data sources: where labelled images come from. Each yields encoded bytes, a label, a stable id and a split hint."""

from __future__ import annotations

from pathlib import Path

from pipeline.artifacts import INGESTED
from pipeline.errors import ParamsError
from pipeline.params import DataParams
from pipeline.sources.cifar import CifarSource
from pipeline.sources.digits import DigitsSource
from pipeline.sources.folder import FolderSource
from pipeline.sources.ingested import Ingested as Ingested
from pipeline.sources.ingested import WithIngested as WithIngested
from pipeline.sources.lists import ListSource
from pipeline.sources.source import BadImageError as BadImageError
from pipeline.sources.source import Row as Row
from pipeline.sources.source import Source as Source
from pipeline.sources.source import in_parts as in_parts
from pipeline.sources.source import reading_order as reading_order
from pipeline.sources.table import TableSource


def open_source(params: DataParams, ingested: Path = INGESTED) -> WithIngested:
    """The source that params.yaml names, with what was taken in. Raises DataError or ParamsError naming what is missing."""
    return WithIngested(open_own(params), Ingested(ingested))


def open_own(params: DataParams) -> Source:
    """The source that params.yaml names, alone. Raises as `open_source` does."""
    if params.source == "digits":
        return DigitsSource()
    if params.source == "table":
        return TableSource(params.location, params.table)
    root = Path(params.location)
    if params.source in ("cifar10", "cifar100"):
        return CifarSource(params.source, root, params.download)
    if not root.is_dir():
        raise ParamsError(
            f"data.location is {params.location!r}, which is not a folder; expected the root of source {params.source}"
        )
    return FolderSource(root) if params.source == "folder" else ListSource(params.source, root, params.lists)
