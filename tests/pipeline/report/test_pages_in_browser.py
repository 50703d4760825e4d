"""The report pages in a real browser: charts without network access, light and dark, phone, print, accessibility."""

from __future__ import annotations

from itertools import pairwise

import pytest

from models.prior import softmax
from pipeline.evaluation.predictions import Predictions
from pipeline.evaluation.run_comparison import compare_runs
from pipeline.params import GateParams
from pipeline.report import render_comparison
from tests.support.browser import Reader
from tests.support.chromium import needs_chromium, started
from tests.support.generated_run import HOSTILE, made_logits, made_prior, made_report

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("report page"), needs_chromium]

CHARTS = ["loss", "validation", "long-tail", "groups", "strength", "reliability", "confusion-matrix"]
CHART_WIDTHS = "[...document.querySelectorAll('.chart')].map((each) => each.querySelector('.main-svg').clientWidth)"
COLOUR = "getComputedStyle(document.querySelector('#long-tail .scatterlayer .points path')).fill"


@pytest.fixture(scope="module")
def browser():
    with started() as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Files of reports with 12 and 1,000 classes, of one with a champion, and of a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    texts = {
        "report": made_report(12, 20),
        "thousand": made_report(1000, 1),
        "champion": made_report(12, 20, champion=True),
        "comparison": made_comparison(),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


def made_comparison():
    import numpy as np

    prior, labels = made_prior(12), np.repeat(np.arange(12), 20)
    ids = [f"{i:03d}" for i in range(len(labels))]
    runs = [Predictions(ids, labels, softmax(made_logits(labels, prior, seed, 3.0 + seed)), prior) for seed in (0, 1)]
    names = ("<script>alert(2)</script>", "runs/new & better")
    return render_comparison(compare_runs(*runs, names, GateParams(resamples=200), 15), "tailor compare")


@pytest.fixture
def report(browser, pages):
    """The report, opened for each test: a test leaves a sorted table, a moved slider or another colour scheme."""
    reader = Reader(browser, pages["report"])
    yield reader
    reader.context.close()


def test_the_report_opens_from_disk_without_requests_or_errors_and_draws_every_chart(report, pages):
    assert report.complaints == []
    assert [url for url in report.requests if not url.startswith("data:")] == [pages["report"].as_uri()]
    for name in CHARTS:
        assert report.evaluate(f"document.querySelectorAll('#{name} .main-svg').length") > 0
    assert report.evaluate("document.querySelectorAll('#long-tail .points path').length") == 12
    assert report.evaluate("document.querySelectorAll('#groups .bars .point').length") == 8
    assert report.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")


def test_the_slider_updates_accuracies_and_line_by_mouse_and_keyboard(report):
    def shown():
        return [report.page.inner_text(f"[data-strength={name}]") for name in ("balanced", "train", "few")]

    def expected(index):
        values = report.evaluate(f"data.strength[{index}]")
        return [f"{100 * values[name]:.1f}%" for name in ("balanced", "train", "few")]

    slider = report.page.locator("#strength-slider")
    assert report.page.inner_text("#strength-value") == "0.00" and shown() == expected(10)
    slider.fill("30")
    assert report.page.inner_text("#strength-value") == "1.00" and shown() == expected(30) != expected(10)
    slider.press("ArrowRight")
    assert report.page.inner_text("#strength-value") == "1.05"
    assert report.evaluate("document.getElementById('strength').layout.shapes[0].x0") == 1.05


def test_no_table_is_cut_on_a_desktop(report):
    cut = "[...document.querySelectorAll('.wide')].filter((each) => each.scrollWidth > each.clientWidth)"
    assert report.evaluate("document.querySelectorAll('#metrics .warning').length") >= 3
    assert report.evaluate(f"{cut}.map((each) => each.getAttribute('aria-label'))") == []


def test_a_hostile_class_name_is_shown_as_text(report):
    assert report.dialogs == []
    assert report.page.locator("#classes th").all_inner_texts()[0] == HOSTILE[0]
    assert report.evaluate("document.querySelectorAll('main script, main a[href^=javascript], [onerror]').length") == 0
    report.page.locator("#tail").scroll_into_view_if_needed()
    x, y = report.evaluate(
        "(() => { const box = document.querySelectorAll('#long-tail .points path')[5].getBoundingClientRect();"
        " return [box.x + box.width / 2, box.y + box.height / 2] })()"
    )
    report.page.mouse.move(x, y)
    report.page.wait_for_selector("#long-tail .hoverlayer .hovertext")
    assert HOSTILE[5] in report.page.locator("#long-tail .hoverlayer .hovertext").text_content()


def test_the_class_table_can_be_searched_and_sorted_by_accuracy(report):
    report.page.fill("#find", "SPECIES 1")
    assert report.page.locator("#classes tr").count() == 2 and "2 of 12" in report.page.inner_text("#class-count")
    report.page.fill("#find", "")
    report.page.select_option("#order", "4 1")
    accuracies = [float(text[:-1]) for text in report.page.locator("#classes td:nth-child(5)").all_inner_texts()]
    assert accuracies == sorted(accuracies) and len(accuracies) == 12


def test_charts_follow_the_colour_scheme(report):
    light = report.evaluate(COLOUR)
    report.page.emulate_media(color_scheme="dark")
    report.wait(f"{COLOUR} !== '{light}'")
    assert report.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 21, 27)"
    assert report.violations() == []
    report.page.emulate_media(color_scheme="light")
    report.wait(f"{COLOUR} === '{light}'")


def test_printed_charts_fit_the_sheet_and_controls_are_hidden(report):
    report.page.emulate_media(media="print")
    report.evaluate("dispatchEvent(new Event('beforeprint'))")
    report.wait(f"{CHART_WIDTHS}.every((width) => width === 680)")
    assert not report.page.is_visible("nav") and not report.page.is_visible("#find")
    assert len(report.page.pdf(format="A4")) > 50_000
    report.page.emulate_media(media="screen")
    report.evaluate("dispatchEvent(new Event('afterprint'))")
    report.wait(f"{CHART_WIDTHS}.every((width) => width !== 680)")


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_a_phone_of_360_pixels_needs_no_horizontal_scrolling(browser, pages, name):
    reader = Reader(browser, pages[name], viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    assert reader.evaluate("document.documentElement.scrollWidth") == 360
    assert max(reader.evaluate(CHART_WIDTHS)) <= 330
    assert reader.violations() == [] and reader.complaints == []
    reader.context.close()


def test_axe_reports_no_serious_violation(report):
    assert report.violations() == []


def test_a_thousand_classes_are_drawn_and_the_table_stays_short(browser, pages):
    reader = Reader(browser, pages["thousand"])
    assert reader.complaints == []
    assert reader.evaluate("document.querySelectorAll('#long-tail .points path').length") == 1000
    assert reader.page.locator("#classes tr").count() == 100
    assert "1,000 of 1,000 classes, the first 100 shown" in reader.page.inner_text("#class-count")
    reader.context.close()


def test_champion_teacher_and_student_have_different_colours(browser, pages):
    reader = Reader(browser, pages["champion"])
    assert reader.complaints == [] and reader.violations() == []
    names = reader.page.locator("#groups .legendtext").all_text_contents()
    assert names == ["champion", "teacher", "student"]
    bars = "[...document.querySelectorAll('#groups .trace.bars')]"
    assert reader.evaluate(f"{bars}.map((each) => each.querySelectorAll('.point').length)") == [4, 4, 4]
    colours = reader.evaluate(f"{bars}.map((each) => getComputedStyle(each.querySelector('.point path')).fill)")
    assert len(set(colours)) == 3
    edges = f"{bars}.map((each) => each.querySelectorAll('.point path')[0].getBoundingClientRect())"
    edges_of_bars = reader.evaluate(f"{edges}.map((box) => [box.left, box.right])")
    assert all(before[1] <= after[0] + 0.5 for before, after in pairwise(edges_of_bars))
    assert "No champion is shown" not in reader.page.inner_text("main")
    reader.context.close()


def test_the_comparison_draws_its_charts_and_escapes_run_names(browser, pages):
    reader = Reader(browser, pages["comparison"], color_scheme="dark")
    assert reader.complaints == [] and reader.dialogs == [] and reader.violations() == []
    assert reader.page.inner_text("header b >> nth=1") == "<script>alert(2)</script>"
    assert reader.evaluate("document.querySelectorAll('#by-class .points path').length") == 12
    assert reader.evaluate("document.querySelectorAll('#differences .points path').length") == 4
    reader.context.close()
