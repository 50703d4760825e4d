"""Duplicate images: byte-identical images by sha256 and near duplicates by perceptual hash."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping

import numpy as np
from PIL import Image

from pipeline.shared.errors import DataError
from pipeline.sources import Row, Source


def check_labels(source: Source, hashes: Mapping[str, str]) -> None:
    """Raise DataError when the same image has two labels: a classifier can neither learn both nor be tested on both.

    hashes: sha256 of the readable images, by reference. The check runs before anything is held out, so that it does not
    depend on a seed. Splits that the source defines are checked separately: published data sets have such pairs across
    splits, and `find_duplicates` reports them.
    """
    pairs = conflicting_labels(source.rows, hashes)
    if pairs:
        row, other = pairs[0]
        more = f" ({len(pairs)} such pairs)" if len(pairs) > 1 else ""
        raise DataError(
            f"{source.location(row)} and {source.location(other)} are the same image, labelled {source.classes[row.label]!r} "
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
    """Groups of at least two byte-identical images, by sha256: the (split, row) of each image."""
    groups: dict[str, list[tuple[str, Row]]] = defaultdict(list)
    for split, rows in assigned.items():
        for row in rows:
            if row.reference in hashes:
                groups[hashes[row.reference]].append((split, row))
    return {digest: group for digest, group in sorted(groups.items()) if len(group) > 1}


def find_duplicates(
    assigned: dict[str, list[Row]], hashes: Mapping[str, str], classes: list[str]
) -> list[tuple[str, str, str, str]]:
    """Byte-identical images in more than one split, as (sha256, split, sample id, class)."""
    return [
        (digest, split, row.sample_id, classes[row.label])
        for digest, group in group_duplicates(assigned, hashes).items()
        if len({split for split, _ in group}) > 1
        for split, row in group
    ]


def perceptual_hash(image: Image.Image) -> str:
    """Perceptual hash of an image, 64 bits as hexadecimal text: similar for a resized, recompressed or brightened copy."""
    from imagehash import phash  # imported here and below, because only `data check` needs it

    return str(phash(image))


def near_pairs(hashes: np.ndarray, distance: int) -> np.ndarray:
    """Pairs of different hashes at most `distance` bits apart, int64 [M,2] of indices, each pair once.

    hashes: uint64 [N], all different. Two hashes that differ in at most d bits are equal in at least one of d+1 bit
    ranges, so only hashes that share a range are compared, not every pair (multi-index hashing, Norouzi et al. 2012).
    """
    edges = np.linspace(0, 64, distance + 2).astype(np.uint64)
    pairs = [np.empty((0, 2), dtype=np.int64)]
    for low, high in itertools.pairwise(edges):
        run = (hashes >> low) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(run, kind="stable")
        run, sorted_hashes = run[order], hashes[order]
        first = np.arange(len(order))
        for step in range(1, len(order)):
            first = first[first + step < len(order)]
            first = first[run[first] == run[first + step]]  # sorted: after a difference no later one is equal
            if not first.size:
                break
            different = (sorted_hashes[first] ^ sorted_hashes[first + step]).view(np.uint8).reshape(-1, 8)
            close = first[np.unpackbits(different, axis=1).sum(axis=1) <= distance]
            pairs.append(np.sort(np.stack([order[close], order[close + step]], axis=1), axis=1))
    return np.unique(np.concatenate(pairs), axis=0)


def group_near_duplicates(hash_texts: list[str], distance: int) -> list[list[int]]:
    """Indices of similar images, in groups of at least two, linked by hashes at most `distance` bits apart.

    hash_texts: hexadecimal hashes from `perceptual_hash`; an image with an empty hash is in no group.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    hashed = [index for index, text in enumerate(hash_texts) if text]
    if not hashed:
        return []
    hashes, which = np.unique(np.array([int(hash_texts[i], 16) for i in hashed], dtype=np.uint64), return_inverse=True)
    pairs = near_pairs(hashes, distance)
    graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(len(hashes), len(hashes)))
    component = connected_components(graph, directed=False)[1][which]
    groups = defaultdict(list)
    for index, number in zip(hashed, component.tolist(), strict=True):
        groups[number].append(index)
    return [members for members in groups.values() if len(members) > 1]
