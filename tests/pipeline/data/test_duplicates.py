"""Near-duplicate detection: the same pairs as an exhaustive comparison, and typical copies of images."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.data.duplicates import group_near_duplicates, near_pairs, perceptual_hash
from tests.support.data_commands import scene
from tests.support.making import encode


@given(st.integers(0, 2**32 - 1), st.integers(0, 10))
def test_near_pairs_equal_a_comparison_of_all_pairs(seed, distance):
    generator = np.random.default_rng(seed)
    bases = generator.integers(0, 2**63, 12, dtype=np.uint64)
    flips = [np.bitwise_or.reduce(np.uint64(1) << generator.integers(0, 64, n, dtype=np.uint64)) for n in range(1, 13)]
    hashes = np.unique(np.concatenate([bases, bases ^ np.array(flips), bases ^ np.uint64(2**63)]))
    actual = {tuple(pair) for pair in near_pairs(hashes, distance).tolist()}
    assert actual == {
        (i, j) for i, a in enumerate(hashes.tolist()) for j, b in enumerate(hashes.tolist())
        if i < j and (a ^ b).bit_count() <= distance
    }  # fmt: skip


def jpeg(image, quality):
    return Image.open(io.BytesIO(encode(image, "JPEG", quality=quality))).convert("RGB")


@pytest.mark.parametrize(
    "copy",
    [
        lambda i: jpeg(i, 60),
        lambda i: i.resize((50, 50)),
        lambda i: jpeg(i.resize((70, 70)), 75),
        lambda i: i.point(lambda v: v * 0.9),
    ],
    ids=["compressed", "smaller", "smaller and compressed", "darker"],
)
def test_a_slightly_changed_copy_is_found_and_no_other_image(copy):
    pictures = [scene(seed) for seed in range(40)]
    looks = [perceptual_hash(picture) for picture in pictures] + [
        perceptual_hash(copy(picture)) for picture in pictures[:5]
    ]
    assert sorted(map(sorted, group_near_duplicates(looks, 4))) == [[i, 40 + i] for i in range(5)]


def test_groups_are_transitive_and_images_without_a_hash_are_in_no_group():
    looks = [f"{value:016x}" for value in (0b0, 0b11, 0b1111, 0xFFFF << 40)]
    assert group_near_duplicates([*looks, "", ""], 2) == [[0, 1, 2]]
    assert group_near_duplicates([], 4) == group_near_duplicates(["", ""], 4) == []
    assert group_near_duplicates([looks[3], looks[3]], 0) == [[0, 1]]
