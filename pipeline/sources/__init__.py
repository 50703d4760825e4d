"""Data sources of labelled images; each gives encoded bytes, a label or label map, a stable sample id and a split."""

from __future__ import annotations

from pathlib import Path

from pipeline.params import DataParams
from pipeline.shared.artifacts import INGESTED
from pipeline.sources.cifar import CifarSource
from pipeline.sources.digits import DigitsSource
from pipeline.sources.folder import FolderSource
from pipeline.sources.ingested import Ingested, ReaderWithIngested, SourceWithIngested
from pipeline.sources.label_maps import UNLABELLED, LabelMapFolder, LabelMapSource, LabelMapTable, decode_label_map
from pipeline.sources.lists import ListSource
from pipeline.sources.shards import CACHE_BYTES
from pipeline.sources.source import (
    BadImageError,
    FileSource,
    Groups,
    ImageReader,
    Row,
    Source,
    existing_root,
    in_parts,
    reading_order,
)
from pipeline.sources.table import TableReader, TableSource

__all__ = [
    "CACHE_BYTES", "UNLABELLED", "BadImageError", "FileSource", "FolderSource", "Groups", "ImageReader", "Ingested",
    "LabelMapSource", "ReaderWithIngested", "Row", "Source", "SourceWithIngested", "decode_label_map", "in_parts",
    "open_base_source", "open_label_maps", "open_reader", "open_source", "reading_order",
]  # fmt: skip


def open_source(params: DataParams, ingested: Path = INGESTED) -> SourceWithIngested:
    """Open the source of params.yaml with the ingested images. Raises DataError or ParamsError if files are missing."""
    return SourceWithIngested(open_base_source(params), Ingested(ingested))


def open_base_source(params: DataParams) -> Source:
    """Open the source of params.yaml without ingested images. Raises as `open_source` does."""
    if params.label_map:
        return open_label_maps(params)
    if params.source == "digits":
        return DigitsSource()
    if params.source == "table":
        return TableSource(params.location, params.table)
    if params.source in ("cifar10", "cifar100"):
        return CifarSource(params.source, Path(params.location), params.download)
    root = existing_root(params.location, params.source)
    return FolderSource(root) if params.source == "folder" else ListSource(params.source, root, params.lists)


def open_label_maps(params: DataParams) -> LabelMapSource:
    """Open the source of task segmentation. Raises as `open_source` does."""
    assert params.label_map
    if params.source == "table":
        return LabelMapTable(params.location, params.table, params.label_map)
    return LabelMapFolder(existing_root(params.location, params.source), params.source, params.label_map)


def open_reader(params: DataParams, cache_bytes: int = CACHE_BYTES, ingested: Path = INGESTED) -> ImageReader:
    """Open a reader of the images in a split table, without listing the source again. Raises as `open_source` does.

    cache_bytes: memory for cached row groups of a table.
    """
    if params.source == "table":
        base: ImageReader = TableReader(params.location, params.table, cache_bytes)
    elif params.source in ("digits", "cifar10", "cifar100"):
        base = open_base_source(params)
    else:
        base = FileSource(existing_root(params.location, params.source))
    return ReaderWithIngested(base, Ingested(ingested))
