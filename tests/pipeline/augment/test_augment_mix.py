"""CutMix and Mixup: mixed pixels of each image and its partner, and the weight of the original label."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.augment import apply_mix, draw_mix
from pipeline.params import AugmentParams


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(mix, count=64, height=12, width=10, alpha=1.0, seed=0):
    params = AugmentParams(crop_padding=0, flip=False, cutout=0, mix=mix, mix_alpha=alpha)
    return draw_mix(count, height, width, params, seeded(seed))


def flat_images(count=64, height=12, width=10):
    """Return images in which every pixel of image i has the value i, to identify the origin of pixels."""
    return torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 3, height, width).contiguous()


def test_no_mix_draws_nothing():
    assert drawn("none") is None


@pytest.mark.parametrize("mix", ["cutmix", "mixup"])
def test_partners_are_a_permutation_of_the_batch(mix):
    partner = drawn(mix).partner
    assert torch.equal(partner.sort().values, torch.arange(64)) and not torch.equal(partner, torch.arange(64))


@given(st.integers(0, 500), st.floats(0.2, 4))
@settings(max_examples=25, deadline=None)
def test_cutmix_copies_one_box_of_the_partner(seed, alpha):
    images, draws = flat_images(), drawn("cutmix", alpha=alpha, seed=seed)
    mixed = apply_mix(images, draws)
    assert mixed.dtype == torch.uint8
    for i, (image, partner) in enumerate(zip(mixed, draws.partner.tolist(), strict=True)):
        top, left, bottom, right = draws.box[i].tolist()
        assert 0 <= top <= bottom <= 12 and 0 <= left <= right <= 10
        expected = torch.full((3, 12, 10), i, dtype=torch.uint8)
        expected[:, top:bottom, left:right] = partner
        assert torch.equal(image, expected)
        if partner != i:
            assert draws.share[i].item() == pytest.approx((image == i).float().mean().item())


def test_cutmix_boxes_are_distributed_as_torchvisions():
    # v2.CutMix with alpha 1: lambda uniform, half-width int(.5·√(1-λ)·W) about a uniform pixel, clipped.
    from torchvision.transforms import v2

    torch.manual_seed(0)
    reference, size = v2.CutMix(alpha=1.0, num_classes=2), 4000
    image = torch.zeros(1, 3, 12, 10, dtype=torch.uint8)
    kept = torch.tensor([reference.make_params([image])["lam_adjusted"] for _ in range(size)])
    actual = drawn("cutmix", count=size).share
    # Five standard errors of a difference of means; the same tolerance for standard deviations.
    tolerance = 5 * (2 * kept.var() / size).sqrt()
    assert abs(actual.mean() - kept.mean()) < tolerance and abs(actual.std() - kept.std()) < tolerance


@given(st.integers(0, 500))
@settings(max_examples=10, deadline=None)
def test_mixup_is_the_weighted_mean_of_an_image_and_its_partner(seed):
    images = torch.randint(0, 256, (32, 3, 6, 6), dtype=torch.uint8, generator=seeded(seed))
    draws = drawn("mixup", count=32, seed=seed)
    assert draws.box is None
    share = draws.share.double()[:, None, None, None]
    exact = share * images + (1 - share) * images[draws.partner]
    mixed = apply_mix(images, draws)
    assert mixed.dtype == torch.uint8 and (mixed - exact).abs().max() <= 0.5 + 1e-4


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_lambda_follows_the_beta_distribution(alpha):
    share = drawn("mixup", count=20_000, alpha=alpha).share.double()
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(share.mean() - 0.5) < 5 * (variance / 20_000) ** 0.5
    assert share.var().item() == pytest.approx(variance, rel=0.05)
    assert share.min() >= 0 and share.max() <= 1


@pytest.mark.parametrize("mix", ["cutmix", "mixup"])
def test_a_rank_mixes_its_share_of_the_batch_as_one_process_would(mix):
    images, draws = flat_images(), drawn(mix)
    whole = apply_mix(images, draws)
    assert torch.equal(apply_mix(images[16:48], draws.rows(16, 48), pool=images), whole[16:48])


@pytest.mark.parametrize("mix", ["cutmix", "mixup"])
def test_only_the_generator_decides_the_draws(mix):
    first, again, other = drawn(mix, seed=1), drawn(mix, seed=1).to("cpu"), drawn(mix, seed=2)
    assert torch.equal(first.partner, again.partner) and torch.equal(first.share, again.share)
    assert not torch.equal(first.share, other.share)
