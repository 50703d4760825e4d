"""Random views: each one a crop, a flip and a hole that a slow reference finds again, by its own draw."""

import collections

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.augment import cutout, random_crop, random_views
from pipeline.params import AugmentParams


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(count, height=8, width=8, low=1):
    """Random pixels without 0, so that black is always a pad or a hole."""
    return torch.randint(low, 256, (count, 3, height, width), dtype=torch.uint8, generator=seeded(9))


def crops_of(image, padding):
    """All crops of a padded image by their place: [(top, left)] → crop."""
    _, height, width = image.shape
    padded = torch.zeros(3, height + 2 * padding, width + 2 * padding, dtype=image.dtype)
    padded[:, padding : padding + height, padding : padding + width] = image
    return {
        (top, left): padded[:, top : top + height, left : left + width]
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
    }


def place_of_crop(image, found, padding):
    places = [place for place, crop in crops_of(image, padding).items() if torch.equal(crop, found)]
    assert len(places) == 1
    return places[0]


@given(st.integers(1, 3), st.integers(5, 9), st.integers(5, 9), st.integers(0, 1000))
def test_a_random_crop_is_one_window_of_the_padded_image(padding, height, width, seed):
    images = pictures(4, height, width)
    found = random_crop(images, padding, seeded(seed))
    assert found.dtype == torch.uint8 and found.shape == images.shape
    for image, crop in zip(images, found, strict=True):
        place_of_crop(image, crop, padding)


def test_every_place_of_the_crop_is_drawn_about_equally_often():
    image = pictures(1)
    found = random_crop(image.expand(5000, -1, -1, -1), 2, seeded())
    places = collections.Counter(place_of_crop(image[0], crop, 2) for crop in found[:2500])
    assert len(places) == 25 and min(places.values()) > 60 and max(places.values()) < 140  # 100 expected, sd 10


def holes_of(side, height, width):
    """The hole of every centre: side x side pixels, clipped at the borders, row by row."""
    made = {}
    for i in range(height):
        for j in range(width):
            top, left = i - side // 2, j - side // 2
            hole = torch.zeros(height, width, dtype=torch.bool)
            for y in range(max(top, 0), min(top + side, height)):
                for x in range(max(left, 0), min(left + side, width)):
                    hole[y, x] = True
            made[i, j] = hole
    return made


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7, 20])
def test_cutout_blackens_one_square_around_a_uniform_centre_and_nothing_else(side):
    images = pictures(1500, 6, 5)
    found = cutout(images, side, seeded())
    known = holes_of(side, 6, 5)
    centres = collections.Counter()
    for image, cut in zip(images, found, strict=True):
        hole = (cut == 0).all(0)
        assert torch.equal(cut[:, ~hole], image[:, ~hole])
        matching = [centre for centre, expected in known.items() if torch.equal(expected, hole)]
        assert matching
        centres.update(dict.fromkeys(matching, 1 / len(matching)))
    # 50 per centre are expected; a centre of an ambiguous hole counts in parts.
    assert len(centres) == 30
    if side <= 3:
        assert min(centres.values()) > 25 and max(centres.values()) < 80


def views_of(images, *, crop=0, flip=False, cut=0, views=1, seed=0):
    return random_views(images, views, AugmentParams(crop_padding=crop, flip=flip, cutout=cut), seeded(seed))


def test_half_of_the_images_are_flipped_and_the_others_are_not():
    images = pictures(2000)
    found = views_of(images, flip=True)[0]
    flipped = (found == images.flip(3)).flatten(1).all(1)
    assert torch.equal(found[~flipped], images[~flipped])
    assert 0.45 < flipped.float().mean() < 0.55


def test_nothing_asked_for_is_nothing_changed():
    images = pictures(5)
    assert torch.equal(views_of(images, views=3), images.expand(3, -1, -1, -1, -1))


def test_views_are_uint8_independent_and_leave_the_batch_as_it_was():
    images = pictures(64)
    before = images.clone()
    found = views_of(images, crop=2, flip=True, cut=3, views=3)
    assert found.shape == (3, 64, 3, 8, 8) and found.dtype == torch.uint8
    assert torch.equal(images, before)
    same = [(found[a] == found[b]).flatten(1).all(1).float().mean() for a, b in ((0, 1), (0, 2), (1, 2))]
    assert max(same) < 0.2, "two draws of one image differ as often as draws do"


def test_a_view_is_a_crop_then_a_flip_then_a_hole():
    image = pictures(1)[0]
    for seed in range(20):
        view = views_of(image[None], crop=1, flip=True, cut=3, seed=seed)[0, 0]
        explained = [
            (crop.flip(2) if flipped else crop).masked_fill(hole, 0)
            for crop in crops_of(image, 1).values()
            for flipped in (False, True)
            for hole in holes_of(3, 8, 8).values()
        ]
        assert any(torch.equal(view, candidate) for candidate in explained)


def test_the_generator_alone_decides():
    images = pictures(16)
    torch.manual_seed(1)
    first = views_of(images, crop=2, flip=True, cut=3, views=2, seed=5)
    torch.manual_seed(2)
    assert torch.equal(first, views_of(images, crop=2, flip=True, cut=3, views=2, seed=5))
    assert not torch.equal(first, views_of(images, crop=2, flip=True, cut=3, views=2, seed=6))


def test_padding_is_black():
    corner = random_crop(torch.full((500, 3, 4, 4), 255, dtype=torch.uint8), 4, seeded())
    assert set(corner.unique().tolist()) == {0, 255}
