"""The report and the model card: whole in themselves, honest about what is missing, safe with any class name."""

import base64
from html.parser import HTMLParser

import jinja2
import pytest
from making import params, png

from pipeline.model_card import model_card
from pipeline.prior import Prior
from pipeline.report import render_report

NASTY = '<script>alert("x")</script> & co'
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """All tags with their attributes and the text of cells and captions; tags must nest."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1], data.strip()))


def metrics_with(**changes):
    values = {
        "all": 0.5, "many": 0.75, "medium": None, "few": 0.25, "balanced_accuracy": 0.5, "top5": 0.875, "nll": 1.25,
        "ece": 0.125, "at_target_prior": {"all": 0.625, "nll": 1.0, "ece": 0.1}, **changes,
    }  # fmt: skip
    return {network: {"balanced": values, "train": values} for network in ("teacher", "student")}


def row(name, count, group, accuracy):
    scores = {f"{n}_{p}": accuracy for n in ("teacher", "student") for p in ("balanced", "train")}
    return {"class": name, "group": group, "train_count": count, "test_count": 4, **scores}


@pytest.fixture
def page():
    classes = [row("tail", 9, "few", None), row(NASTY, 1500, "many", 0.5)]
    samples = [
        {"file": "000.png", "label": NASTY, "balanced": "tail", "train": NASTY, "bytes": png(0)},
        {"file": "001.jpg", "label": "tail", "balanced": "tail", "train": "tail", "bytes": b"any"},
    ]
    return render_report(metrics_with(), classes, samples, params({"evaluate.top_k": 5}))


def test_the_page_parses_and_refers_to_nothing_outside_itself(page):
    parsed = Page(page)
    assert "http" not in page and "//" not in page.replace("base64,", "").split("<body>")[0]
    for tag, attributes in parsed.tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href", "srcset", "data", "action"):
            assert attributes.get(name, "data:").startswith("data:")
        assert "url(" not in attributes.get("style", "")
    assert "@import" not in page and "url(" not in page


def test_pictures_are_inside_the_page_byte_for_byte(page):
    images = [attributes for tag, attributes in Page(page).tags if tag == "img"]
    assert [image["src"].partition(",")[0] for image in images] == ["data:image/png;base64", "data:image/jpeg;base64"]
    assert base64.b64decode(images[0]["src"].partition(",")[2]) == png(0)
    assert images[0]["alt"] == f"test image of {NASTY}"


def test_a_class_name_is_text_and_never_a_tag(page):
    parsed = Page(page)
    assert ("td", NASTY) in parsed.texts and ("b", NASTY) in parsed.texts
    assert "<script" not in page


def test_an_empty_group_and_an_untested_class_are_not_a_number(page):
    cells = [text for tag, text in Page(page).texts if tag == "td"]
    start = cells.index("student, balanced")
    assert cells[start : start + 10] == [
        "student, balanced", "50.0%", "75.0%", "n/a", "25.0%", "50.0%", "87.5%", "1.250", "12.5%", "62.5%"
    ]  # fmt: skip
    start = cells.index("tail")
    assert cells[start : start + 5] == ["tail", "few", "9", "n/a", "n/a"]


def test_classes_come_head_first_and_images_on_which_the_priors_differ_are_marked(page):
    parsed = Page(page)
    cells = [text for tag, text in parsed.texts if tag == "td"]
    assert cells.index(NASTY) < cells.index("tail") and "1,500" in cells
    assert [attributes.get("class") for tag, attributes in parsed.tags if tag == "figure"] == ["differ", None]


def test_a_metric_that_is_missing_fails_rather_than_leaving_a_hole():
    broken = metrics_with()
    del broken["student"]["train"]["ece"]
    with pytest.raises((jinja2.UndefinedError, TypeError), match=r"ece|StrictUndefined"):
        render_report(broken, [row("a", 1, "few", 0.5)], [], params())


def test_the_model_card_has_a_row_for_every_class_and_prior_whatever_their_names():
    names = ["a|b", "two\nlines", "plain"]
    prior = Prior(names, [200, 50, 5], [0.7, 0.2, 0.1], [-0.3, -1.6, -2.3], ["many", "medium", "few"])
    card = model_card(params(), prior, metrics_with()["student"])
    lines = card.splitlines()
    assert lines[0] == "---" and lines.index("---", 1) > 1
    header = lines.index("| class | training samples | group |")
    cells = [line.replace("\\|", "PIPE").strip("|").split("|") for line in lines[header + 2 : header + 5]]
    assert [[cell.strip() for cell in row] for row in cells] == [
        ["aPIPEb", "200", "many"], ["two lines", "50", "medium"], ["plain", "5", "few"]
    ]  # fmt: skip
    assert any(line.startswith("| balanced | 50.0% | 75.0% | n/a | 25.0% |") for line in lines)
