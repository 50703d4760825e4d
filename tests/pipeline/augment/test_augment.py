"""Augmented views of a batch: independent crop, flip, policy and cutout per view; the same for a batch in parts."""

import collections

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.augment import apply_views, crops, draw_views, operations
from pipeline.params import AugmentParams

POLICIES = ["none", "autoaugment", "randaugment", "simaugment", "stacked"]


def random_views(images, views, params, generator):
    """Draw random numbers and apply them: uint8 [B,3,H,W] → uint8 [views,B,3,H,W]."""
    draws = draw_views(len(images), *images.shape[2:], views, params, generator)
    return apply_views(images, draws, params)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(count, height=8, width=8, low=1):
    """Return random pixels without 0, so that black is always padding or cutout."""
    return torch.randint(low, 256, (count, 3, height, width), dtype=torch.uint8, generator=seeded(9))


def augment(*, crop=0, flip=False, cut=0, **others):
    return AugmentParams(crop_padding=crop, flip=flip, cutout=cut, **others)


def everything(policy, contrast="same"):
    """Return params in which every augmentation is enabled."""
    cut = 0 if policy == "simaugment" and contrast in ("same", "simaugment") else 3
    return augment(crop=2, flip=True, cut=cut, policy=policy, contrast_policy=contrast)


def views_of(images, *, views=1, seed=0, **keys):
    return random_views(images, views, augment(**keys), seeded(seed))


def crops_of(image, padding):
    """Return all crops of a padded image by position: (top, left) → crop."""
    _, height, width = image.shape
    padded = torch.zeros(3, height + 2 * padding, width + 2 * padding, dtype=image.dtype)
    padded[:, padding : padding + height, padding : padding + width] = image
    return {
        (top, left): padded[:, top : top + height, left : left + width]
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
    }


def place_of_crop(image, actual, padding):
    places = [place for place, crop in crops_of(image, padding).items() if torch.equal(crop, actual)]
    assert len(places) == 1
    return places[0]


def holes_of(side, height, width):
    """Return the cutout of every centre, row by row: side x side pixels, clipped at the borders."""
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


@given(st.integers(1, 3), st.integers(5, 9), st.integers(5, 9), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_a_padded_crop_is_one_window_of_the_padded_image(padding, height, width, seed):
    images = pictures(4, height, width)
    actual = views_of(images, crop=padding, seed=seed)[0]
    assert actual.dtype == torch.uint8 and actual.shape == images.shape
    for image, crop in zip(images, actual, strict=True):
        place_of_crop(image, crop, padding)


def test_every_crop_position_is_drawn_about_equally_often():
    image = pictures(1)
    actual = views_of(image.expand(2500, -1, -1, -1), crop=2)[0]
    places = collections.Counter(place_of_crop(image[0], crop, 2) for crop in actual)
    assert len(places) == 25 and min(places.values()) > 50 and max(places.values()) < 150  # 100 expected, sd 10


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7, 20])
def test_cutout_blackens_one_square_around_a_uniform_centre_and_nothing_else(side):
    images = pictures(1500, 6, 5)
    actual = views_of(images, cut=side)[0]
    known = holes_of(side, 6, 5)
    centres = collections.Counter()
    for image, cut in zip(images, actual, strict=True):
        hole = (cut == 0).all(0)
        assert torch.equal(cut[:, ~hole], image[:, ~hole])
        matching = [centre for centre, expected in known.items() if torch.equal(expected, hole)]
        assert matching
        centres.update(dict.fromkeys(matching, 1 / len(matching)))
    # 50 per centre are expected; a centre with an ambiguous cutout counts in fractions.
    assert len(centres) == 30
    if side <= 3:
        assert min(centres.values()) > 20 and max(centres.values()) < 85


def test_half_of_the_images_are_flipped_and_the_others_are_not():
    images = pictures(2000)
    actual = views_of(images, flip=True)[0]
    flipped = (actual == images.flip(3)).flatten(1).all(1)
    assert torch.equal(actual[~flipped], images[~flipped])
    assert 0.45 < flipped.float().mean() < 0.55


def test_params_without_augmentation_change_no_pixel():
    images = pictures(5)
    assert torch.equal(views_of(images, views=3), images.expand(3, -1, -1, -1, -1))


def test_padding_is_black():
    corner = views_of(torch.full((500, 3, 4, 4), 255, dtype=torch.uint8), crop=4)
    assert set(corner.unique().tolist()) == {0, 255}


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 80), (97, 64)])
def test_resized_crops_are_the_same_one_by_one_and_all_at_once(height, width):
    images = pictures(4, height, width)
    sides = torch.tensor(height), torch.tensor(width)
    box = crops.boxes_of(crops.draw_chances(12, seeded(1)), *sides, [0.05, 1.0]).view(3, 4, 4)
    flipped = torch.randint(2, (3, 4), generator=seeded(2)).bool()
    views = crops.resize_one_by_one(images, box, flipped)
    assert torch.equal(views, crops.resize_all_at_once(images, box, flipped))
    assert torch.equal(views, crops.resized_crop(images, box, flipped))


def test_a_view_is_a_crop_then_a_flip_then_a_hole():
    image = pictures(1)[0]
    for seed in range(20):
        view = views_of(image[None], crop=1, flip=True, cut=3, seed=seed)[0, 0]
        explained = (
            (crop.flip(2) if flipped else crop).masked_fill(hole, 0)
            for crop in crops_of(image, 1).values()
            for flipped in (False, True)
            for hole in holes_of(3, 8, 8).values()
        )
        assert any(torch.equal(view, candidate) for candidate in explained)


@pytest.mark.parametrize("policy", POLICIES)
def test_views_are_uint8_and_independent_and_the_batch_is_unchanged(policy):
    images = pictures(96, 16, 12)
    before = images.clone()
    actual = random_views(images, 3, everything(policy), seeded())
    assert actual.shape == (3, *images.shape) and actual.dtype == torch.uint8
    assert torch.equal(images, before)
    same = [(actual[a] == actual[b]).flatten(1).all(1).float().mean() for a, b in ((0, 1), (0, 2), (1, 2))]
    assert max(same) < 0.1, "two draws of one image are as different as those of two images"


@pytest.mark.parametrize("policy", POLICIES)
def test_the_draws_of_two_views_and_of_two_images_are_not_correlated(policy):
    [table] = draw_views(1000, 32, 32, 2, everything(policy), seeded(3)).tables
    columns = table[..., table.flatten(0, 1).std(0) > 0]
    for one, other in ((columns[0], columns[1]), (columns[:, :-1].flatten(0, 1), columns[:, 1:].flatten(0, 1))):
        one, other = ((part - part.mean(0)) / part.std(0) for part in (one, other))
        # Under independence a correlation has standard deviation 1/√n.
        assert (one * other).mean(0).abs().max() < 5 / len(one) ** 0.5


@pytest.mark.parametrize("policy", POLICIES)
def test_only_the_generator_decides_the_draws(policy):
    images, params = pictures(16), everything(policy)
    torch.manual_seed(1)
    first = random_views(images, 2, params, seeded(5))
    torch.manual_seed(2)
    assert torch.equal(first, random_views(images, 2, params, seeded(5)))
    assert not torch.equal(first, random_views(images, 2, params, seeded(6)))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("contrast", ["same", "simaugment"])
@given(st.data())
@settings(max_examples=5, deadline=None)
def test_the_rows_of_a_share_give_that_share_of_the_whole_batch(policy, contrast, data):
    images, params = pictures(10), everything(policy, contrast)
    start = data.draw(st.integers(0, 9))
    stop = data.draw(st.integers(start + 1, 10))
    draws = draw_views(10, 8, 8, 3, params, seeded(data.draw(st.integers(0, 99))))
    whole = apply_views(images, draws, params)
    assert torch.equal(apply_views(images[start:stop], draws.rows(start, stop), params), whole[:, start:stop])


@pytest.mark.parametrize("bicubic", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_computing_all_rows_as_a_gpu_does_gives_the_same_bytes(policy, bicubic, monkeypatch):
    images, params = pictures(200, 16, 12), everything(policy).model_copy(update={"bicubic": bicubic})
    draws = draw_views(200, 16, 12, 3, params, seeded())
    chosen_rows = apply_views(images, draws, params)
    monkeypatch.setattr(operations, "computes_all_rows", lambda _: True)
    assert torch.equal(apply_views(images, draws, params), chosen_rows)


@pytest.mark.slow
@pytest.mark.parametrize("contrast", ["autoaugment", "simaugment", "cut"])
def test_the_gpu_path_is_one_graph_that_reads_no_value_on_the_host(contrast, monkeypatch):
    from torch.fx.experimental.proxy_tensor import make_fx

    monkeypatch.setattr(operations, "computes_all_rows", lambda _: True)
    cut = contrast == "cut"  # each view has different pixels
    images = pictures(12).view(4, 3, 3, 8, 8) if cut else pictures(4)
    params = everything("stacked", "simaugment" if cut else contrast).model_copy(update={"bicubic": True})
    draws = draw_views(4, 8, 8, 3, params, seeded())

    def applied(*tables):
        return apply_views(images, type(draws)(tables), params)

    # Tracing with fake tensors fails where a value is read or a shape depends on one.
    graph = make_fx(applied, tracing_mode="fake", _allow_non_fake_inputs=True)(*draws.tables)
    assert torch.equal(graph(*draws.tables), apply_views(images, draws, params))


def test_the_classifier_view_and_the_contrast_views_follow_their_own_policies():
    images = pictures(40)
    params = augment(policy="none", contrast_policy="autoaugment")
    actual = random_views(images, 3, params, seeded())
    assert torch.equal(actual[0], images)
    changed = (actual != images).flatten(2).any(2).float().mean(1)
    assert changed[1] > 0.5 and changed[2] > 0.5


def test_simaugment_enlarges_a_box_and_cuts_no_hole_where_the_other_views_pad_and_cut():
    images = torch.full((50, 3, 8, 8), 200, dtype=torch.uint8)
    params = augment(crop=2, cut=3, contrast_policy="simaugment", jitter=0.0)
    actual = random_views(images, 2, params, seeded())
    assert (actual[0] == 0).flatten(1).any(1).all()
    assert (actual[1] == 200).all()


def test_a_single_view_needs_no_contrast_draws():
    params = augment(policy="none", contrast_policy="stacked")
    assert [table.shape[0] for table in draw_views(5, 8, 8, 1, params, seeded()).tables] == [1]
    assert [table.shape[0] for table in draw_views(5, 8, 8, 3, params, seeded()).tables] == [1, 2]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"crop_scale": [0.9, 0.2]}, "smaller share"),
        ({"crop_scale": [0.0, 1.0]}, "greater than 0"),
        ({"crop_scale": [0.5, 1.5]}, "less than or equal to 1"),
        ({"crop_scale": [0.5]}, "at least 2"),
        ({"crop": "centre"}, "'pad' or 'resized'"),
        ({"policy": "same"}, "'none', 'autoaugment'"),
        ({"policy": "autoaugement"}, "'none', 'autoaugment'"),
        ({"mix": "cutmixup"}, "'none', 'cutmix' or 'mixup'"),
        ({"mix_alpha": 0.0}, "greater than 0"),
        ({"jitter": 1.5}, "less than or equal to 1"),
        ({"policy": "simaugment", "cutout": 8}, "no Cutout"),
        ({"colour": 0.1}, "Extra inputs"),
    ],
)
def test_invalid_augment_params_are_rejected(keys, message):
    with pytest.raises(ValidationError, match=message):
        AugmentParams(**{"crop_padding": 0, "flip": False, "cutout": 0, **keys})


def test_the_number_of_threads_changes_no_byte_and_is_restored():
    images, before, views = pictures(8), torch.get_num_threads(), []
    params = everything("autoaugment")
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            views.append(random_views(images, 3, params, seeded()))
            assert torch.get_num_threads() == threads
        with pytest.raises(RuntimeError):  # draws of another number of images
            apply_views(images, draw_views(5, 8, 8, 3, params, seeded()), params)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*views)


def test_padding_and_cutout_have_the_colour_of_fill_where_they_are_black_else():
    images = torch.full((20, 3, 8, 8), 10, dtype=torch.uint8)
    params = AugmentParams(crop_padding=2, flip=True, cutout=3)
    draws = draw_views(20, 8, 8, 2, params, torch.Generator().manual_seed(0))
    black = apply_views(images, draws, params)
    filled = apply_views(images, draws, params.model_copy(update={"fill": [1, 2, 255]}))
    empty = (black == 0).all(2, keepdim=True)
    colour = torch.tensor([1, 2, 255], dtype=torch.uint8).view(3, 1, 1)
    assert empty.any() and torch.equal(filled, torch.where(empty, colour, black))
