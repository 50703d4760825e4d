"""Preprocessing from encoded bytes to the network's input: every image mode, orientation, crop position and size."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from torchvision import transforms

from models.preprocess import ImageError, decode, preprocess, resize, to_rgb

RANDOM = np.random.default_rng(0)
COLOUR = RANDOM.integers(0, 256, (20, 28, 3), dtype=np.uint8)
GREY = RANDOM.integers(0, 256, (20, 28), dtype=np.uint8)
WIDE = RANDOM.integers(0, 65536, (20, 28), dtype=np.uint16)


def encode(image, form="PNG", **options):
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, form, **options)
    return stream.getvalue()


def pixels(data):
    image = decode(data)
    assert image.mode == "RGB"
    return np.asarray(image)


def oriented(image, orientation, form, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, form, exif=exif, **options)


def test_rgb_png_and_lossless_webp_come_out_pixel_for_pixel():
    assert np.array_equal(pixels(encode(COLOUR)), COLOUR)
    assert np.array_equal(pixels(encode(COLOUR, "WEBP", lossless=True)), COLOUR)


def test_a_jpeg_is_decoded_as_by_pillow():
    data = encode(COLOUR, "JPEG", quality=95)
    assert np.array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_grayscale_has_three_equal_channels(form):
    actual = pixels(encode(GREY, form))
    assert actual.shape == (20, 28, 3)
    assert np.array_equal(actual[..., 0], actual[..., 1]) and np.array_equal(actual[..., 0], actual[..., 2])
    if form == "PNG":
        assert np.array_equal(actual[..., 0], GREY)


def test_cmyk_becomes_the_colours_it_prints():
    image = Image.new("CMYK", (40, 20), (0, 255, 255, 0))
    image.paste((255, 0, 0, 0), (20, 0, 40, 20))
    actual = pixels(encode(image, "JPEG", quality=100)).astype(int)
    assert np.abs(actual[:, 4:16] - [255, 0, 0]).max() <= 8, "magenta and yellow print red"
    assert np.abs(actual[:, 24:36] - [0, 255, 255]).max() <= 8, "cyan stays cyan"


def test_16_bit_grey_keeps_its_high_byte():
    actual = pixels(encode(WIDE))
    assert np.array_equal(actual[..., 0], WIDE // 256) and np.array_equal(actual[..., 2], WIDE // 256)


def test_32_bit_grey_is_read_on_the_same_scale_and_clipped():
    actual = np.asarray(to_rgb(Image.fromarray(np.array([[-5, 0, 255, 256, 65535, 70000]], dtype=np.int32))))
    assert actual[0, :, 0].tolist() == [0, 0, 0, 1, 255, 255]


@pytest.mark.parametrize("mode", ["1", "LA", "RGBA", "P"])
def test_bilevel_alpha_and_palette_images_become_rgb(mode):
    image = Image.fromarray(COLOUR).convert(mode)
    reference = Image.fromarray(COLOUR).convert(mode).convert("RGB")
    assert np.array_equal(pixels(encode(image)), np.asarray(reference))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "16-bit"])
def test_every_exif_orientation_is_turned_upright(kind, orientation):
    form, image = {"png": ("PNG", COLOUR), "jpeg": ("JPEG", COLOUR), "webp": ("WEBP", COLOUR), "16-bit": ("PNG", WIDE)}[
        kind
    ]
    data = oriented(image, orientation, form)
    reference = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert decode(data).size == ((20, 28) if orientation >= 5 else (28, 20))
    expected = np.asarray(reference)
    if kind == "16-bit":
        expected = (expected // 256).astype(np.uint8)[..., None].repeat(3, axis=2)
    assert np.array_equal(pixels(data), expected)


def xmp(orientation):
    return f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()


def with_segments(*contents):
    data = encode(COLOUR, "JPEG")
    return data[:2] + b"".join(b"\xff\xe1" + (len(part) + 2).to_bytes(2, "big") + part for part in contents) + data[2:]


def exif_of(order, kind, value, others=()):
    """Return EXIF with an orientation tag of a type (3 short, 4 long) after other tags (number, type, count, value)."""
    field = struct.pack(order + ("Hxx" if kind == 3 else "I"), value)
    entries = b"".join(struct.pack(order + "HHII", *tag) for tag in others) + struct.pack(order + "HHI", 0x112, kind, 1)
    head = struct.pack(order + "2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(others) + 1)
    return b"Exif\0\0" + head + entries + field + bytes(4)


def png_with(kind, text):
    data = encode(COLOUR)
    return (
        data[:33] + struct.pack(">I", len(text)) + kind + text + struct.pack(">I", zlib.crc32(kind + text)) + data[33:]
    )


EXIF_TEXT = b"\nexif\n      42\n" + exif_of(">", 3, 8).hex().encode() + b"\n"
TAGGED = {
    "short, little endian": with_segments(exif_of("<", 3, 6)),
    "long, big endian": with_segments(exif_of(">", 4, 5)),
    "two values": with_segments(exif_of("<", 3, 6).replace(b"\3\0\1\0\0\0", b"\3\0\2\0\0\0")),
    "behind other tags": with_segments(exif_of("<", 3, 7, [(0x10F, 2, 12, 30), (0x110, 2, 12, 30)])),
    "in two segments": with_segments(exif_of("<", 3, 8)[:20], b"Exif\0\0" + exif_of("<", 3, 8)[20:]),
    "exif and xmp": with_segments(exif_of("<", 3, 3), b"http://ns.adobe.com/xap/1.0/\0" + xmp(6)),
    "exif upright and xmp": with_segments(exif_of("<", 3, 1), b"http://ns.adobe.com/xap/1.0/\0" + xmp(6)),
    "xmp in jpeg": with_segments(b"http://ns.adobe.com/xap/1.0/\0" + xmp(6)),
    "xmp in webp": encode(COLOUR, "WEBP", xmp=xmp(8)),
    "xmp in png": png_with(b"iTXt", b"XML:com.adobe.xmp\0\0\0en\0key\0" + xmp(5)),
    "xmp in png, packed": png_with(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp(6))),
    "exif in a png's text": png_with(b"tEXt", b"Raw profile type exif\0" + EXIF_TEXT),
    "exif in a png's text, packed": png_with(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(EXIF_TEXT)),
}


@pytest.mark.filterwarnings("ignore:Metadata Warning")
@pytest.mark.parametrize("data", TAGGED.values(), ids=TAGGED)
def test_orientation_is_read_as_pillow_reads_it(data):
    image = Image.open(io.BytesIO(data))
    expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.array_equal(pixels(data), expected)
    assert np.array_equal(expected, np.asarray(image)) == (data is TAGGED["exif upright and xmp"])


@pytest.mark.parametrize(
    "exif", [b"", b"II", b"no tags at all", b"II*\0\0\0\0\0", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\0\5\1"]
)
def test_exif_that_cannot_be_read_costs_the_picture_nothing(exif):
    assert np.array_equal(pixels(png_with(b"eXIf", exif)), COLOUR)
    assert np.array_equal(pixels(with_segments(b"Exif\0\0" + exif)), pixels(encode(COLOUR, "JPEG")))


def test_several_pictures_in_one_file_give_the_first():
    data = encode(COLOUR, "MPO", save_all=True, append_images=[Image.fromarray(COLOUR[::-1])])
    assert np.array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data))))


def test_an_upright_image_is_the_same_for_every_stored_orientation():
    stored_sideways = np.rot90(COLOUR)  # counter-clockwise; orientation 6 means: rotate clockwise to view
    assert np.array_equal(pixels(oriented(np.ascontiguousarray(stored_sideways), 6, "PNG")), COLOUR)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_means_nothing_is_ignored(orientation):
    assert np.array_equal(pixels(oriented(COLOUR, orientation, "PNG")), COLOUR)


def test_a_damaged_exif_tag_costs_the_picture_nothing():
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 3, 1.5
    data = bytearray(encode(COLOUR, exif=exif))
    at = data.index(b"eXIf") + 4
    # XResolution declared as text: Pillow reads it, but fails to write it back.
    kind = data.index(bytes.fromhex("011a") if data[at : at + 2] == b"MM" else bytes.fromhex("1a01"), at) + 2
    data[kind : kind + 2] = b"\x00\x02" if data[at : at + 2] == b"MM" else b"\x02\x00"
    length = int.from_bytes(data[at - 8 : at - 4], "big")
    data[at + length : at + length + 4] = zlib.crc32(data[at - 4 : at + length]).to_bytes(4, "big")
    assert np.array_equal(pixels(bytes(data)), COLOUR[::-1, ::-1])


def test_32_by_32_pixels_pass_through_untouched():
    image = RANDOM.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    actual = preprocess(encode(image), 32, 32)
    assert actual.dtype == np.uint8 and actual.shape == (3, 32, 32) and actual.flags.c_contiguous
    assert np.array_equal(actual, image.transpose(2, 0, 1))


@pytest.mark.parametrize(("width", "height"), [(28, 20), (20, 28), (21, 21), (100, 20), (20, 31)])
def test_a_picture_whose_shorter_side_fits_is_only_cropped_in_the_centre(width, height):
    image = RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8)
    actual = resize(Image.fromarray(image), 16, min(width, height)).transpose(1, 2, 0)
    places = [
        (top, left)
        for top in range(height - 15)
        for left in range(width - 15)
        if np.array_equal(image[top : top + 16, left : left + 16], actual)
    ]
    assert len(places) == 1, "the crop is a window of the picture, pixel for pixel"
    assert abs(places[0][0] - (height - 16) / 2) <= 0.5 and abs(places[0][1] - (width - 16) / 2) <= 0.5


@pytest.mark.parametrize(("width", "height"), [(96, 64), (64, 96), (500, 250), (33, 66), (40, 40), (16, 16)])
def test_the_shorter_side_is_resized_and_the_centre_cropped_as_torchvision_does(width, height):
    from torchvision.transforms import functional

    # Sizes for which both libraries agree on the longer side; for others torchvision truncates it.
    image = Image.fromarray(RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8))
    reference = functional.center_crop(functional.resize(image, 32, antialias=True), 24)
    assert np.array_equal(resize(image, 24, 32), np.asarray(reference).transpose(2, 0, 1))


def test_a_large_picture_is_averaged_and_not_sampled():
    board = np.indices((256, 256)).sum(axis=0) % 2 * 255
    actual = preprocess(encode(board.astype(np.uint8)), 16, 16)
    assert np.abs(actual.astype(int) - 127).max() <= 2


def test_a_tiny_picture_is_enlarged():
    assert (
        preprocess(encode(np.full((1, 1, 3), 77, dtype=np.uint8)), 16, 20).tolist() == np.full((3, 16, 16), 77).tolist()
    )


def photograph(width, height):
    """Return a photograph-like image: smooth gradients with fine noise."""
    random = np.random.default_rng(width)
    light = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    grain = random.normal(0, 8, (height, width, 3))
    return Image.fromarray((np.asarray(light) + grain).clip(0, 255).astype(np.uint8))


def apart(actual, expected):
    return np.abs(actual.astype(int) - expected.astype(int))


# 573 is not divisible by 8: without Pillow's box the crop is half a pixel off, visible at an edge.
@pytest.mark.parametrize("size", [(720, 573), (573, 720), (513, 515), (1201, 1103)])
@pytest.mark.parametrize("orientation", [1, 2, 3, 6, 8])
def test_a_large_jpeg_decoded_at_a_fraction_is_close_to_full_decoding(size, orientation):
    data = oriented(photograph(*size), orientation, "JPEG", quality=92)
    reduced, whole = preprocess(data, 56, 64), preprocess(data, 56, 64, room=0)
    assert reduced.shape == whole.shape == (3, 56, 56)
    assert apart(reduced, whole).mean() < 0.8 and apart(reduced, whole).max() <= 8
    assert (apart(reduced, whole) > 0).any(), "decoded at a fraction, not whole"


@pytest.mark.parametrize("mode", ["L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_large_jpeg_of_any_kind_is_decoded_at_a_fraction(mode, progressive):
    data = encode(photograph(800, 600).convert(mode), "JPEG", quality=92, progressive=progressive)
    assert 0 < apart(preprocess(data, 56, 64), preprocess(data, 56, 64, room=0)).mean() < 0.8


@pytest.mark.parametrize(
    ("size", "reduced"), [((256, 256), True), ((600, 256), True), ((600, 255), False), ((64, 40), False)]
)
def test_a_jpeg_is_decoded_at_a_fraction_only_if_four_times_the_side_remains(size, reduced):
    data, seen = encode(photograph(*size), "JPEG"), []
    actual = preprocess(data, 32, 32, allow=seen.append)
    assert seen == [size[0] * size[1] // (4 if reduced else 1)]
    assert (not np.array_equal(actual, preprocess(data, 32, 32, room=0))) == reduced


def test_a_large_picture_of_another_format_is_decoded_whole():
    for form in ("PNG", "WEBP"):
        data = encode(photograph(400, 300), form)
        assert np.array_equal(preprocess(data, 32, 32), preprocess(data, 32, 32, room=0))
        assert decode(data, 32).size == (400, 300)


def test_pixels_that_are_not_allowed_are_not_decoded(monkeypatch):
    def refuse(pixels):
        raise ImageError("pixels", f"has {pixels}")

    encoded = [encode(photograph(400, 300), form) for form in ("PNG", "WEBP", "JPEG")]
    monkeypatch.setattr(Image.Image, "load", None)
    for data in encoded:
        with pytest.raises(ImageError, match=r"has 120000$"):
            preprocess(data, 200, 200, allow=refuse)


@pytest.mark.parametrize(("size", "resize_to"), [(224, 256), (17, 20), (16, 16)])
@pytest.mark.parametrize(
    "picture",
    [(467, 352), (352, 467), (500, 375), (333, 500), (451, 300), (257, 256), (256, 301), (21, 20), (64, 3001)],
)
def test_the_network_sees_what_torchvisions_resize_and_centre_crop_show(picture, size, resize_to):
    width, height = picture
    image = Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))
    expected = transforms.CenterCrop(size)(transforms.Resize(resize_to)(image))
    assert np.array_equal(resize(image, size, resize_to).transpose(1, 2, 0), np.asarray(expected))
