"""Class maps in the client: cut out of the canvas, at the size of the upright image, as files with a palette."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from models.label_map_image import palette
from serving.client.class_maps import segmentations, upright_size
from serving.client.extras import Extras
from serving.client.requests import RequestSequence
from serving.commands import main
from serving.shared.errors import InputError, ServingError

NAMES = np.array([b"road", b"car", b"sign"], dtype=np.object_)


def answered(inside: tuple[int, int]) -> dict[str, np.ndarray]:
    """Return the outputs for one image: class 1 in its left half, 0 in its right half, 2 in the padding."""
    class_map = np.full((8, 16), 2, dtype=np.uint8)
    class_map[: inside[0], : inside[1]] = 0
    class_map[: inside[0], : inside[1] // 2] = 1
    rows = {"class_map": class_map, "confidence": np.full((8, 16), 51, dtype=np.uint8), "size": np.array(inside)}
    return {name: value[None] for name, value in {**rows, "names": NAMES}.items()}


def test_the_padding_is_cut_off_and_the_map_has_the_size_of_the_image():
    [found] = segmentations(answered((8, 12)), [(24, 16)], version=3)
    assert found.class_map.shape == (16, 24) and found.version == 3
    assert (found.class_map[:, :12] == 1).all() and (found.class_map[:, 12:] == 0).all()
    assert found.confidence == pytest.approx(np.full((16, 24), 0.2))
    assert found.shares() == {"road": 0.5, "car": 0.5}


def test_the_written_file_holds_class_numbers_and_the_palette(tmp_path):
    [found] = segmentations(answered((8, 16)), [(16, 8)], version=1)
    found.save(tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as stored:
        assert stored.mode == "P" and (np.asarray(stored) == found.class_map).all()
        assert stored.convert("RGB").getpixel((0, 0)) == tuple(palette()[3:6])
    with pytest.raises(InputError, match=r"map.jpg: a class map is written as PNG"):
        found.save("map.jpg")


def test_colours_of_all_classes_differ_and_are_not_black():
    colours = np.array(palette()).reshape(256, 3)
    assert len({tuple(colour) for colour in colours.tolist()}) == 256
    assert colours[255].tolist() == [0, 0, 0] and colours[:255].sum(1).min() > 0


def test_an_overlay_needs_the_image_of_the_class_map():
    [found] = segmentations(answered((8, 16)), [(16, 8)], version=1)
    assert found.overlay(Image.new("RGB", (16, 8))).size == (16, 8)
    with pytest.raises(InputError, match="image has 8x8 pixels; its class map has 16x8"):
        found.overlay(Image.new("RGB", (8, 8)))


@pytest.mark.parametrize(("orientation", "expected"), [(1, (20, 10)), (3, (20, 10)), (6, (10, 20)), (8, (10, 20))])
def test_the_size_is_that_of_the_upright_image(orientation, expected):
    stream, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (20, 10)).save(stream, "JPEG", exif=exif)
    assert upright_size(stream.getvalue()) == expected


def test_class_maps_have_no_extra_parts_of_an_answer():
    requests = RequestSequence("http://server")
    requests.model, requests._inputs = "segmenter", {"image": 1, "prior": 1}
    with pytest.raises(ServingError, match="http://server: segmenter has no input `coverage`; omit it"):
        next(requests._extra_inputs(Extras(coverage=0.9)))


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("--out", "map.jpg", "a class map is written as PNG"),
        ("--overlay", "street.txt", "expected a name that ends in .jpg, .jpeg, .png, .webp"),
        ("--overlay", "none/street.png", "in a folder that does not exist"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_request(tmp_path, capsys, option, name, message):
    assert main(["segment", "street.jpg", option, str(tmp_path / name), "--url", "http://127.0.0.1:9"]) == 2
    assert f"{option} is '{tmp_path / name}'" in (printed := capsys.readouterr().err) and message in printed
