"""`tailor playground` in a real browser: upload an image, change a prior, a damaged file, a folder to CSV."""

from __future__ import annotations

import base64
import contextlib
import csv
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CLASSES, Release, picture
from PIL import Image

from models.label_map_image import palette
from models.preprocess import preprocess
from models.prior import log_class_prior, softmax
from serving.client.class_maps import Segmentation
from serving.client.extras import Extras
from serving.client.predictions import NearestImage, Prediction
from serving.drift.estimate import write_live_prior
from serving.playground.answers import PriorResult, as_html, parse_own_prior, side_by_side, thumbnail, unique_names
from serving.playground.extras import overlay, parse_extras
from serving.playground.page import find_samples
from serving.server.triton_server import TritonServer
from serving.shared.errors import InputError, ServingError
from tests.support.chromium import needs_chromium, started
from tests.support.segmentation_release import segmentation_server, street

with_browser = [pytest.mark.end_to_end, pytest.mark.xdist_group("playground"), needs_chromium]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_a_class_name_is_escaped() -> None:
    hostile = Prediction(("<script>alert(1)</script>",), (0,), (1.0,), 1)
    assert "<script>" not in as_html(
        [PriorResult("balanced", hostile, 1.0), PriorResult("<b>", None, 0.0, "<img src=x>")]
    )


@pytest.mark.parametrize(
    ("typed", "prior"),
    [
        ("0.7, 0.3", [0.7, 0.3]),
        ("0.7 0.3\n", [0.7, 0.3]),
        ("[0.7, 0.3]", [0.7, 0.3]),
        ('{"a": 1}', {"a": 1}),
        ("3 1", [0.75, 0.25]),
        ("cat: 3, dog: 1", {"cat": 0.75, "dog": 0.25}),
        ("cat: big: 3\ndog : 1\n", {"cat: big": 0.75, "dog": 0.25}),
        ('{"a, b": 6, "c": 2}', {"a, b": 0.75, "c": 0.25}),
    ],
)
def test_a_typed_prior_is_parsed_from_numbers_pairs_or_json(typed: str, prior: object) -> None:
    assert parse_own_prior(typed) == prior


@pytest.mark.parametrize(
    "typed",
    [
        "cat and dog",
        '"train"',
        "true",
        "{",
        pytest.param("9" * 2_000_000, id="two million digits"),
        "cat: many",
        "cat: 1, cat: 2",
        "cat: -1, dog: 3",
        "0 0",
        "cat: nan",
        "[1e308, 1e308]",
        "[true]",
        '["1"]',
        "[]",
        "1e400",
    ],
)
def test_an_invalid_typed_prior_is_rejected_in_one_line(typed: str) -> None:
    with pytest.raises(InputError, match="your own prior") as refused:
        parse_own_prior(typed)
    assert len(str(refused.value)) < 250


def test_a_column_whose_best_class_differs_from_the_first_is_marked() -> None:
    ant, bee = (Prediction((name, "cow"), (0, 1), (0.9, 0.1), 1) for name in ("<ant>", "bee"))
    html = as_html(
        [PriorResult("bal & anced", ant, 1.0), PriorResult("train", bee, 1.0), PriorResult("live", ant, 1.0)]
    )
    assert re.findall(r'section class="([^"]+)"><h3>([^<]+)', html) == [
        ("column", "bal &amp; anced"), ("column changed", "train"), ("column", "live"),
    ]  # fmt: skip
    assert html.count("other class than bal &amp; anced") == 1


def test_samples_are_the_images_of_the_folder_or_none_without_a_folder(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "samples.csv"):
        (tmp_path / name).touch()
    assert find_samples(tmp_path) == [tmp_path / "a.JPG", tmp_path / "b.png"]
    assert find_samples(tmp_path / "missing") == []


def test_a_picture_taken_sideways_is_shown_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # EXIF orientation: the first row is the right side
    wide = Image.new("RGB", (64, 32), "blue")
    wide.paste("red", (0, 0, 32, 32))
    data = io.BytesIO()
    wide.save(data, "JPEG", exif=exif, quality=95)
    shown = re.search(r"base64,([^\"]+)", thumbnail(data.getvalue(), "sideways.jpg"))
    assert shown is not None
    small = Image.open(io.BytesIO(base64.b64decode(shown[1])))
    assert small.size == (32, 64)
    above, below = (small.convert("RGB").getpixel((16, y)) for y in (8, 56))
    assert above[0] > 200 > below[0] and below[2] > 200 > above[2]


def test_files_of_one_name_get_unique_names() -> None:
    files = ["cat/1.jpg", "dog/1.jpg", "dog/2.jpg", "dog/1.jpg (2)"]
    assert unique_names([Path(file) for file in files]) == ["1.jpg (1)", "1.jpg (3)", "2.jpg", "1.jpg (2)"]


def test_the_map_lies_on_the_crop_that_the_network_sees() -> None:
    """Red grows from left to right and green from top to bottom, so each pixel has its place in the image."""
    height, width, size, resize_to = 300, 420, 224, 256
    place = np.zeros((height, width, 3))
    place[..., 0], place[..., 1] = np.arange(width) / 2, np.arange(height)[:, None] / 2
    data = io.BytesIO()
    Image.fromarray(place.round().astype(np.uint8)).save(data, "PNG")
    flat = Prediction(("ant",), (0,), (1.0,), 1, activation_map=((1.0, 1.0),) * 2, activation_crop=size / resize_to)
    drawn = Image.open(io.BytesIO(base64.b64decode(overlay(data.getvalue(), flat)))).resize((size, size))
    seen = preprocess(data.getvalue(), size, resize_to).transpose(1, 2, 0)
    assert np.abs(np.asarray(drawn, dtype=int) - seen)[4:-4, 4:-4].max() <= 2
    corners = Prediction(("ant",), (0,), (1.0,), 1, activation_map=((0.0, 0.0), (0.0, 1.0)), activation_crop=1.0)
    square = np.asarray(Image.open(io.BytesIO(base64.b64decode(overlay(data.getvalue(), corners)))))
    assert square[-10, -10, 2] > 0 and square[10, 10].tolist() == place[12, 72].round().tolist()


def test_the_names_of_nearest_images_are_escaped_and_the_map_is_drawn_where_it_is_high() -> None:
    near = (NearestImage('"><script>', "<b>", 0.5, b"jpeg"),)
    plain = Prediction(("ant",), (0,), (1.0,), 1)
    explained = Prediction(("ant",), (0,), (1.0,), 1, nearest=near, activation_map=((-1.0, 3.0), (-1.0, 3.0)))
    data = io.BytesIO()
    Image.new("RGB", (80, 40), "blue").save(data, "PNG")
    html = as_html([PriorResult("balanced", explained, 1.0)], data.getvalue())
    assert "<script>" not in html and "<b>" not in html and base64.b64encode(b"jpeg").decode() in html
    drawn = Image.open(io.BytesIO(base64.b64decode(re.findall(r"png;base64,([^\"]+)", html)[0])))
    assert drawn.getpixel((5, 128)) == (0, 0, 255) and drawn.getpixel((250, 128))[0] > 100
    assert "<img" not in as_html([PriorResult("balanced", plain, 1.0)], data.getvalue())


def test_each_extra_part_is_off_unless_it_is_typed() -> None:
    assert parse_extras("", " ", "", "", False) is None
    assert parse_extras("0.9", "", "", "", False) == Extras(coverage=0.9)
    assert parse_extras("", "0.8", "0.4", "0.05", True) == Extras(level=0.8, ask=0.4, false_alarms=0.05, explain=True)
    for wrong in ("many", "2", "nan"):
        with pytest.raises(InputError, match="coverage is"):
            parse_extras(wrong, "", "", "", False)


class NoSets:
    """A client of a release without prediction sets."""

    url = "http://server"

    def predict(self, *_: object, extras: Extras | None = None) -> list[Prediction]:
        if extras is not None and extras.coverage:
            raise ServingError("http://server refused: coverage: this release has no prediction sets")
        return [Prediction(("ant",), (0,), (1.0,), 1)]


def test_a_part_that_the_release_lacks_is_an_error_in_each_column() -> None:
    assert all(result.prediction for result in side_by_side(NoSets(), b"", 0.5, ""))  # type: ignore[arg-type]
    refused = side_by_side(NoSets(), b"", 0.5, "", Extras(coverage=0.9))  # type: ignore[arg-type]
    assert {result.error for result in refused} == {"coverage: this release has no prediction sets"}
    assert [result.title for result in refused] == ["balanced", "train", "live", "strength 0.5"]


def test_a_class_map_is_drawn_over_its_image_and_its_difference_is_marked() -> None:
    maps = [np.zeros((8, 12), np.uint8), np.zeros((8, 12), np.uint8)]
    maps[1][:4, 6:] = 1
    names = ("road", "<car>")
    drawn = [Segmentation(each, np.ones((8, 12), np.float32), names, 1) for each in maps]
    results = [PriorResult(title, each, 1.0) for title, each in zip(("balanced", "train"), drawn, strict=True)]
    html = as_html(results, street())
    assert "<car>" not in html and html.count("25.0 % of the pixels have another class than balanced") == 1
    overlays = re.findall(r"png;base64,([^\"]+)", html)
    right = Image.open(io.BytesIO(base64.b64decode(overlays[1])))
    assert right.size == (12, 8) and right.tobytes() == drawn[1].overlay(Image.open(io.BytesIO(street()))).tobytes()
    for share, colour in (("75.0", palette()[:3]), ("25.0", palette()[3:6])):
        assert f"width:{share}0%;background:rgb{tuple(colour)}" in html


@pytest.mark.slow
def test_an_unreachable_server_is_an_error_of_one_line() -> None:
    done = run("--url", "http://127.0.0.1:9", "--timeout", "1")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "127.0.0.1:9" in done.stderr


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "serving.commands", "playground", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with started() as browser:  # one for the module: a thread can have only one synchronous Playwright
        yield browser


@pytest.fixture(scope="module")
def open_page(server: TritonServer, browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The playground on the session's server, open in Chromium; `page.external_requests`: requests to other hosts."""
    samples = tmp_path_factory.mktemp("samples")
    for seed in (7, 8):
        (samples / f"sample-{seed}.png").write_bytes(picture(seed))
    with opened_page(server, browser, samples, tmp_path_factory.mktemp("uploads")) as page:
        yield page


@contextlib.contextmanager
def opened_page(server: TritonServer, browser: Any, samples: Path, uploads: Path) -> Iterator[Any]:
    """Open the playground on a server. samples: folder of sample images. uploads: an empty folder."""
    command = [sys.executable, "-m", "serving.commands", "playground", "--url", server.http_url, "--port", "0"]
    command += ["--samples", str(samples)]
    environment = os.environ | {"GRADIO_TEMP_DIR": str(uploads)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            address = next(line for line in process.stdout or [] if line.startswith("playground ")).split()[1]
            page = browser.new_page()
            page.external_requests = []
            page.on(
                "request",
                lambda request: page.external_requests.append(request.url) if not is_local(request.url) else None,
            )
            page.goto(address)
            yield page
        finally:
            process.terminate()
            process.wait(timeout=30)


def reload(page: Any) -> Any:
    """Load the page again, which resets its inputs, and wait until it answers."""
    page.reload()
    page.wait_for_selector("#image input[type=file]", state="attached", timeout=60_000)
    page.wait_for_selector("#samples button img", timeout=60_000)
    return page


@pytest.fixture
def page(open_page: Any) -> Any:
    """The open playground with its initial inputs, whatever the tests before have typed."""
    return reload(open_page)


def is_local(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:"))


def columns(page: Any) -> dict[str, str]:
    """Return the text of the page's columns by title."""
    sections = page.locator("#answers .column").all()
    return {section.locator("h3").inner_text(): section.inner_text() for section in sections}


def tab_to(page: Any, inside: str) -> None:
    """Press Tab until a matching element has the focus, and check that the focus is visible."""
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("(inside) => document.activeElement.matches(inside)", inside):
            ring = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert ring != "none", f"{inside} has the focus and nothing shows it"
            return
    pytest.fail(f"{inside} is not reached by Tab")


def upload(page: Any, path: Path) -> None:
    """Upload a file, replacing the previous one."""
    if page.locator("#image button[aria-label='Clear']").count():
        page.locator("#image button[aria-label='Clear']").first.click()
        page.wait_for_selector("#answers :text('Drop an image')")
    page.set_input_files("#image input[type=file]", path)


def file_chooser(page: Any) -> Any:
    """Return the file dialog that Enter on the image's button opens; retried, since a new page may not listen yet."""
    from playwright.sync_api import TimeoutError as NothingOpened

    for _ in range(6):
        reload(page)
        tab_to(page, "#image button")
        with contextlib.suppress(NothingOpened), page.expect_file_chooser(timeout=5_000) as chooser:
            page.keyboard.press("Enter")
            return chooser.value
    raise AssertionError("Enter on the image's button opens no file chooser")


class TestInABrowser:
    """Tests of one page; each uploads its own files."""

    pytestmark = with_browser

    def test_an_image_is_classified_under_each_prior_side_by_side(
        self, page: Any, release: Release, tmp_path: Path
    ) -> None:
        (tmp_path / "noise.png").write_bytes(picture(3))
        upload(page, tmp_path / "noise.png")
        page.wait_for_selector("#answers .column", timeout=60_000)
        shown = columns(page)
        assert list(shown) == ["balanced", "train", "live", "strength 0.5"]
        train = softmax(release.logits([picture(3)])[0] + log_class_prior(release.manifest.counts))
        best = int(train.argmax())
        assert CLASSES[best] in shown["train"].splitlines()[1]
        assert f"{100 * train[best]:.1f} %" in shown["train"]
        assert "ms, version 1" in shown["balanced"]
        assert "tailor drift --write" in shown["live"]

    def test_a_typed_prior_and_the_slider_change_the_prediction(self, page: Any, tmp_path: Path) -> None:
        (tmp_path / "noise.png").write_bytes(picture(4))
        upload(page, tmp_path / "noise.png")
        page.wait_for_selector("#answers .column", timeout=60_000)
        page.fill("#own textarea", '{"emu": 1}')
        page.locator("#own textarea").blur()
        page.wait_for_selector("#answers h3:text('your own')")
        assert columns(page)["your own"].splitlines()[1:3] == ["emu", "100.0 %"]
        page.locator("#strength input[type=range]").focus()
        page.keyboard.press("Home")
        page.wait_for_selector("#answers h3:text-is('strength 0')")
        shown = columns(page)
        assert shown["strength 0"].splitlines()[1:5] == shown["balanced"].splitlines()[1:5]

    def test_a_typed_coverage_and_price_get_an_error_and_a_decision(self, page: Any, tmp_path: Path) -> None:
        (tmp_path / "noise.png").write_bytes(picture(4))
        upload(page, tmp_path / "noise.png")
        page.wait_for_selector("#answers .column", timeout=60_000)
        assert "decision" not in page.inner_text("#answers")
        page.get_by_role("button", name="More in an answer").click()
        page.fill("#ask textarea, #ask input", "0")
        page.locator("#ask textarea, #ask input").blur()
        page.wait_for_selector("#answers :text('ask a person')")
        page.fill("#coverage textarea, #coverage input", "0.9")
        page.locator("#coverage textarea, #coverage input").blur()
        page.wait_for_selector("#answers :text('this release has no prediction sets')")

    def test_a_live_prior_written_by_drift_has_its_own_prediction(
        self, page: Any, release: Release, repository: Path, tmp_path: Path
    ) -> None:
        shares = np.array([0.01, 0.01, 0.01, 0.01, 0.96])
        (tmp_path / "noise.png").write_bytes(picture(3))
        written = write_live_prior(repository, release.manifest, shares, {})
        try:
            upload(page, tmp_path / "noise.png")
            page.wait_for_selector("#answers .column", timeout=60_000)
            shown = columns(page)
        finally:
            written.unlink()  # the server is shared by the session
        live = softmax(release.logits([picture(3)])[0] + np.log(shares))
        best = int(live.argmax())
        assert shown["live"].splitlines()[1:3] == [CLASSES[best], f"{100 * live[best]:.1f} %"]
        assert "ms, version 1" in shown["live"]
        assert shown["live"].splitlines()[1:3] not in [shown[name].splitlines()[1:3] for name in ("balanced", "train")]

    def test_an_image_is_chosen_and_a_prior_typed_with_the_keyboard_alone(self, page: Any, tmp_path: Path) -> None:
        (tmp_path / "noise.png").write_bytes(picture(4))
        file_chooser(page).set_files(tmp_path / "noise.png")
        page.wait_for_selector("#answers .column", timeout=60_000)
        tab_to(page, "#strength input[type=range]")
        page.keyboard.press("End")
        page.wait_for_selector("#answers h3:text-is('strength 2')")
        tab_to(page, "#own textarea")
        page.keyboard.type("emu: 5")
        page.keyboard.press("Enter")
        page.wait_for_selector("#answers h3:text('your own')")
        assert columns(page)["your own"].splitlines()[1:3] == ["emu", "100.0 %"]
        tab_to(page, "[role=tab][aria-selected=false]")
        page.keyboard.press("Enter")
        page.wait_for_selector("#classify", state="visible")
        tab_to(page, "#classify")
        page.keyboard.press("Enter")
        page.wait_for_selector("#summary :text('0 images')")

    def test_a_sample_image_is_classified_when_it_is_clicked(self, page: Any, release: Release) -> None:
        page.locator("#samples button img").nth(1).click()
        page.wait_for_selector("#preview :text('sample-8.png')", timeout=60_000)
        best = int(release.logits([picture(8)])[0].argmax())
        assert columns(page)["balanced"].splitlines()[1] == CLASSES[best]

    def test_sample_images_are_shown_whole_below_their_label(self, page: Any) -> None:
        box, label = (page.locator(f"#samples{part}").bounding_box() for part in ("", " [data-testid=block-label]"))
        for image in page.locator("#samples button img").all():
            shown = image.bounding_box()
            assert box["x"] <= shown["x"] and shown["x"] + shown["width"] <= box["x"] + box["width"]
            assert shown["y"] >= label["y"] + label["height"]

    def test_a_damaged_file_gets_an_error_message(self, page: Any, tmp_path: Path) -> None:
        (tmp_path / "broken.png").write_bytes(picture(5)[:60])
        upload(page, tmp_path / "broken.png")
        page.wait_for_selector("#answers [role=alert]", timeout=60_000)
        assert "broken.png" in page.inner_text("#answers")
        assert page.locator("#answers .column").count() == 0

    def test_a_folder_becomes_a_table(self, page: Any, tmp_path: Path) -> None:
        folder = tmp_path / "photos"
        folder.mkdir()
        for seed in range(5):
            (folder / f"{seed}.png").write_bytes(picture(seed))
        (folder / "inside").mkdir()
        (folder / "inside/4.png").write_bytes(picture(5))
        (folder / "broken.png").write_bytes(b"no picture")
        page.get_by_role("tab", name="Many images").click()
        page.set_input_files("#folder input[type=file]", folder)
        page.locator("#folder [aria-label='4.png']").first.wait_for(timeout=60_000)
        page.click("#classify")
        page.wait_for_selector("#summary :text('6 classified, 1 failed')", timeout=60_000)
        assert page.locator("#rows tbody tr").count() == 7 and page.locator("#rows tbody img").count() == 6
        shown = {
            cells[1]: cells[2]
            for line in page.inner_text("#rows tbody").splitlines()
            if len(cells := line.split("\t")) > 2
        }
        assert shown["broken.png"] == "is not a JPEG, PNG or WebP image" and shown["0.png"] in CLASSES
        wide = page.viewport_size
        page.set_viewport_size({"width": 390, "height": 800})
        height = {cell.inner_text(): cell.bounding_box()["height"] for cell in page.locator("#rows th").all()}
        assert len(set(height.values())) == 1 and max(height.values()) < 45, "a heading is broken on a phone"
        page.set_viewport_size(wide)
        with page.expect_download() as download:
            page.locator("#csv a[download]").first.click()
        rows = list(csv.DictReader(Path(download.value.path()).read_text(encoding="utf-8").splitlines()))
        names = {"0.png", "1.png", "2.png", "3.png", "4.png (1)", "4.png (2)", "broken.png"}
        assert {row["image"] for row in rows} == names
        assert [row["error"] != "" for row in rows if row["image"] == "broken.png"] == [True]

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_contrast_and_names_pass_axe_in_light_and_dark(self, page: Any, tmp_path: Path, scheme: str) -> None:
        axe = pytest.importorskip("axe_playwright_python.sync_playwright")
        (tmp_path / "noise.png").write_bytes(picture(3))
        page.goto(page.url.partition("?")[0] + f"?__theme={scheme}")
        page.wait_for_selector("#image input[type=file]", state="attached")
        upload(page, tmp_path / "noise.png")
        page.wait_for_selector("#answers .column", timeout=60_000)
        reported = axe.Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa"]}).response["violations"]
        violations = [
            (violation["id"], node["target"], node["html"][:120])
            for violation in reported
            for node in violation["nodes"]
        ]
        assert violations == []

    def test_a_server_of_class_maps_gets_a_tab_with_overlays(self, browser: Any, tmp_path: Path) -> None:
        (tmp_path / "street.png").write_bytes(street(24, 16))
        (tmp_path / "torn.png").write_bytes(street(24, 16)[:60])
        with (
            segmentation_server(tmp_path / "server") as server,
            opened_page(server, browser, tmp_path, tmp_path) as page,
        ):
            page.wait_for_selector("#image input[type=file]", state="attached", timeout=60_000)
            assert page.get_by_role("tab").all_inner_texts() == ["Class map"]
            page.set_input_files("#image input[type=file]", tmp_path / "street.png")
            page.wait_for_selector("#answers .column img.map", timeout=60_000)
            shown = columns(page)
            assert list(shown) == ["balanced", "train", "strength 0.5"]
            assert {"road", "car & bus", "sign"} < set(shown["balanced"].splitlines())
            drawn = page.locator("#answers img.map").first
            assert drawn.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [24, 16]
            page.fill("#own textarea", "sign: 1")
            page.locator("#own textarea").blur()
            page.wait_for_selector("#answers h3:text('your own')")
            assert columns(page)["your own"].splitlines()[1:3] == ["sign", "100.0 %"]
            assert "of the pixels have another class than balanced" in columns(page)["your own"]
            upload(page, tmp_path / "torn.png")
            page.wait_for_selector("#answers [role=alert]", timeout=60_000)
            assert page.external_requests == []

    def test_the_page_sends_no_request_to_other_hosts(self, page: Any) -> None:
        assert page.external_requests == []
