"""Crops of images with label maps, against torch's interpolation, and photometric distortion, against colorsys."""

import colorsys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as reference

from pipeline.augment import apply_crops, draw_crops
from pipeline.augment.photometric import apply_photometric, draw_photometric
from pipeline.augment.segmentation import choose_crops
from pipeline.params import SegmentationAugmentParams

MEAN = torch.tensor([124, 116, 104], dtype=torch.uint8)


def params(**changes):
    return SegmentationAugmentParams(**{"crop": [24, 32], "photometric": False, **changes})


def batch(count=6, height=40, width=50):
    generator = torch.Generator().manual_seed(0)
    # Smooth images, so that a shift of the geometry by a fraction of a pixel is visible and rounding is not.
    coarse = torch.rand(count, 3, 6, 7, generator=generator) * 255
    images = F.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 255).to(torch.uint8)
    blocks = torch.randint(4, (count, 1, 5, 6), generator=generator, dtype=torch.uint8)
    labels = F.interpolate(blocks, size=(height, width), mode="nearest-exact")[:, 0]
    labels[:, 0] = 255
    return images, labels


def plain_crop(image, label, crop, size, index):
    """Resize one image with torch, cut, flip and pad it."""
    tall, wide, top, left = (int(side[index]) for side in crop[:4])
    resized = F.interpolate(image[None].double(), size=(tall, wide), mode="bilinear", align_corners=False)[0]
    nearest = F.interpolate(label[None, None], size=(tall, wide), mode="nearest-exact")[0, 0]
    resized = resized[:, top : top + size[0], left : left + size[1]]
    nearest = nearest[top : top + size[0], left : left + size[1]]
    if crop.flipped[index]:
        resized, nearest = resized.flip(2), nearest.flip(1)
    image_out = MEAN.double()[:, None, None].repeat(1, *size)
    label_out = torch.full(size, 255, dtype=torch.uint8)
    image_out[:, : resized.shape[1], : resized.shape[2]] = resized
    label_out[: nearest.shape[0], : nearest.shape[1]] = nearest
    return image_out, label_out


@pytest.mark.parametrize(
    "changes", [{"ratio": [1.0, 2.0]}, {"ratio": [0.3, 0.7]}, {"scale": [64, 30]}, {"crop": [17, 61], "max_share": 1.0}]
)
def test_image_and_label_map_are_resized_cut_flipped_and_padded_together(changes):
    options, (images, labels) = params(**changes), batch()
    draws = draw_crops(6, options, torch.Generator().manual_seed(1))
    cut, own = apply_crops(images, labels, draws, options)
    size = tuple(options.crop)
    assert cut.shape == (1, 6, 3, *size) and own.shape == (6, *size)
    sides = [torch.full((6,), side) for side in labels.shape[1:]]
    crop = choose_crops(labels, *sides, draws.tables[0][0], options, 255)
    assert crop.flipped.unique().tolist() == [False, True]
    for index in range(6):
        image_out, label_out = plain_crop(images[index], labels[index], crop, size, index)
        assert torch.equal(own[index], label_out)
        # Two roundings to grey levels, one per axis.
        assert (cut[0, index] - image_out).abs().max() < 1.01


def test_images_of_different_sizes_are_cropped_as_if_they_were_alone():
    options, (images, labels) = params(scale=[50, 40]), batch(3)
    sizes = torch.tensor([[40, 50], [30, 44], [25, 20]])
    draws = draw_crops(3, options, torch.Generator().manual_seed(2))
    padded_images, padded_labels = images.clone(), labels.clone()
    for index, (height, width) in enumerate(sizes.tolist()):
        padded_images[index, :, height:], padded_images[index, :, :, width:] = 0, 0
        padded_labels[index, height:], padded_labels[index, :, width:] = 3, 3
    cut, own = apply_crops(padded_images, padded_labels, draws, options, sizes)
    for index, (height, width) in enumerate(sizes.tolist()):
        alone = images[index, None, :, :height, :width], labels[index, None, :height, :width]
        expected = apply_crops(*alone, draws.of([index]), options)
        assert torch.equal(cut[0, index], expected[0][0, 0])
        assert torch.equal(own[index], expected[1][0])


def test_a_crop_filled_by_one_class_is_drawn_again():
    labels = torch.zeros(64, 40, 60, dtype=torch.uint8)
    labels[:, :, 45:] = 1
    images = torch.zeros(64, 3, 40, 60, dtype=torch.uint8)
    shares = {}
    for limit in (0.75, 1.0):
        options = params(crop=[20, 20], ratio=[1.0, 1.0], max_share=limit)
        _, own = apply_crops(images, labels, draw_crops(64, options, torch.Generator().manual_seed(3)), options)
        shares[limit] = torch.stack([(own == 0), (own == 1)]).double().mean((2, 3)).amax(0)
    # 9 of 41 positions qualify: all ten attempts fail in 8 % of the images.
    assert (shares[0.75] < 0.75).double().mean() > 0.8
    assert (shares[1.0] < 0.75).double().mean() < 0.4


def test_ignored_pixels_are_no_class_of_the_75_percent_rule():
    # Left half: class 1 and ignored pixels. Right half: two classes.
    labels = torch.full((64, 20, 60), 255, dtype=torch.uint8)
    labels[:, ::2, :30] = 1
    labels[:, :, 30:], labels[:, ::2, 30:] = 2, 3
    options = params(crop=[20, 20], ratio=[1.0, 1.0], flip=False)
    draws = draw_crops(64, options, torch.Generator().manual_seed(3))
    _, own = apply_crops(torch.zeros(64, 3, 20, 60, dtype=torch.uint8), labels, draws, options)
    assert ((own == 2).sum((1, 2)) > 0).double().mean() > 0.95


def row(brightness=0.0, contrast=1.0, first=1.0, saturation=1.0, hue=0.0):
    return torch.tensor([[brightness, contrast, first, saturation, hue]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("saturation", "degrees"), [(1.0, 36.0), (1.0, -35.0), (0.5, 0.0), (1.5, 0.0), (1.4, 20.0), (1.0, 0.0)]
)
def test_saturation_and_hue_are_those_of_hsv(saturation, degrees):
    image = torch.randint(256, (1, 3, 12, 12), dtype=torch.uint8)
    image[0, :, 0] = image[0, :1, 0]  # grey pixels
    out = apply_photometric(image, row(saturation=saturation, hue=degrees))[0]
    for pixel, result in zip(image[0].flatten(1).T.tolist(), out.flatten(1).T.tolist(), strict=True):
        hue, sat, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in pixel))
        expected = colorsys.hsv_to_rgb((hue + degrees / 360) % 1, min(1, sat * saturation), value)
        assert result == pytest.approx([255 * channel for channel in expected], abs=0.51)


def test_the_hue_equals_torchvision():
    image = torch.randint(256, (1, 3, 12, 12), dtype=torch.uint8)
    out = apply_photometric(image, row(hue=18.0)).int()
    assert (out - reference.adjust_hue(image, 0.05).int()).abs().max() <= 1


def test_contrast_comes_before_or_after_the_colour_as_drawn():
    image = torch.randint(256, (1, 3, 8, 8), dtype=torch.uint8)
    values = np.clip(image.numpy().astype(float) + 20, 0, 255)
    first = apply_photometric(image, row(brightness=20, contrast=1.4, first=1)).numpy()
    assert np.abs(first - np.clip(values * 1.4, 0, 255)).max() <= 0.5
    orders = [apply_photometric(image, row(contrast=1.5, first=order, saturation=1.5)) for order in (0.0, 1.0)]
    assert not torch.equal(*orders)


def test_each_change_has_probability_one_half():
    drawn = draw_photometric(4000, torch.Generator().manual_seed(0))
    unchanged = torch.tensor([0.0, 1, 1, 1, 0], dtype=torch.float64)
    assert ((drawn == unchanged).double().mean(0) - 0.5).abs().max() < 0.04
    assert drawn[:, 0].abs().max() <= 32 and drawn[:, 4].abs().max() <= 36
    for factors in (drawn[:, 1], drawn[:, 3]):
        assert 0.5 <= factors.min() < 0.52 and 1.48 < factors.max() <= 1.5


def test_the_defaults_apply_all_changes_to_the_images_alone():
    images, labels = batch()
    options = SegmentationAugmentParams(crop=[24, 32])
    cut, own = apply_crops(images, labels, draw_crops(6, options, torch.Generator().manual_seed(5)), options)
    assert cut.dtype == own.dtype == torch.uint8
    assert set(own.unique().tolist()) <= {0, 1, 2, 3, 255}


@pytest.mark.parametrize(
    ("changes", "message"), [({"ratio": [2.0, 0.5]}, "smaller factor"), ({"scale": [512, 2048]}, "long side")]
)
def test_ranges_in_the_wrong_order_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        params(**changes)
