"""Images that are there more than once: byte for byte, or nearly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from pipeline.errors import DataError
from pipeline.sources import Row, Source


def check_labels(source: Source, hashes: Mapping[str, str]) -> None:
    """Raise DataError when an image lies under two labels: no classifier can learn both, nor be tested on both.

    hashes: of the images that could be read, by reference. Looked at before anything is held out, so that it does not
    depend on a seed. Splits that the source itself brings are compared apart: published data sets hold such pairs, and
    `find_duplicates` reports them.
    """
    pairs = conflicting_labels(source.rows, hashes)
    if pairs:
        row, other = pairs[0]
        more = f" ({len(pairs)} such pairs)" if len(pairs) > 1 else ""
        raise DataError(
            f"{source.place(row)} and {source.place(other)} are the same image, labelled {source.classes[row.label]!r} "
            f"and {source.classes[other.label]!r}; keep one of them{more}"
        )


def conflicting_labels(rows: list[Row], hashes: Mapping[str, str]) -> list[tuple[Row, Row]]:
    """Pairs of rows of one split that are the same image under two labels, the later row first."""
    first: dict[tuple[str, str], Row] = {}
    pairs = []
    for row in rows:
        if row.reference in hashes:
            other = first.setdefault((row.split, hashes[row.reference]), row)
            if other.label != row.label:
                pairs.append((row, other))
    return pairs


def group_duplicates(assigned: dict[str, list[Row]], hashes: Mapping[str, str]) -> dict[str, list[tuple[str, Row]]]:
    """Byte-identical images by sha256: the (split, row) of each, where there are at least two."""
    places: dict[str, list[tuple[str, Row]]] = defaultdict(list)
    for split, rows in assigned.items():
        for row in rows:
            if row.reference in hashes:
                places[hashes[row.reference]].append((split, row))
    return {digest: found for digest, found in sorted(places.items()) if len(found) > 1}


def find_duplicates(
    assigned: dict[str, list[Row]], hashes: Mapping[str, str], classes: list[str]
) -> list[tuple[str, str, str, str]]:
    """Byte-identical images found in more than one split, as (sha256, split, sample id, class)."""
    return [
        (digest, split, row.sample_id, classes[row.label])
        for digest, found in group_duplicates(assigned, hashes).items()
        if len({split for split, _ in found}) > 1
        for split, row in found
    ]
