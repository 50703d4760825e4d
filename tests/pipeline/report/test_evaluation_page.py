"""The report: figures agree with the metrics, names are escaped, the size is bounded, model cards are valid."""

import base64
import io
import json
import re
import sys
from html.parser import HTMLParser

import jinja2
import numpy as np
import plotly.graph_objects as go
import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard
from PIL import Image

from models.calibration import fit_served_temperature
from models.preprocess import ImageError
from pipeline.data.class_prior import Prior
from pipeline.evaluation.metrics import adjusted_probabilities, prediction_metrics
from pipeline.report.analysis import analyse_predictions, write_plots
from pipeline.report.data_card import SplitSizes, data_card, data_facts
from pipeline.report.mistakes import confusion_matrix, confusion_pairs, extreme_classes
from pipeline.report.page import SIDE, as_script, render_page, thumbnail
from pipeline.report.reliability import reliability
from pipeline.report.strength import STRENGTHS, strength_sweep
from tests.support.generated_run import HOSTILE, made_logits, made_model_card, made_prior, made_report
from tests.support.making import ROOT, encode, params, picture, png

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Parser that collects tags with their attributes, and texts; asserts that tags nest."""

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


@pytest.fixture(scope="module")
def text():
    return made_report(12, 20)


@pytest.fixture(scope="module")
def parsed(text):
    return Page(text)


@pytest.fixture(scope="module")
def content(text):
    """Return the data that page.js reads."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


@pytest.fixture(scope="module")
def made():
    """Return labels, prior and logits [N,C] of twelve classes."""
    prior, labels = made_prior(12), np.repeat(np.arange(12), 25)
    return labels, prior, made_logits(labels, prior, 0)


def coloured(figure):
    """Return a figure as the browser draws it, with the page's colours."""
    return json.loads(re.sub(r'"var\(--[a-z]+\)"', '"#123456"', json.dumps(figure)))


def test_plotly_accepts_every_chart(content):
    lines = {"long-tail", "groups", "strength", "reliability", "loss", "validation"}
    assert set(content["figures"]) == {*lines, "confusion-matrix"}
    for name, figure in content["figures"].items():
        assert len(go.Figure(coloured(figure)).data) >= (2 if name in lines else 1)


def test_the_page_is_self_contained_and_allows_only_its_own_scripts(parsed):
    policy = next(tag["content"] for name, tag in parsed.tags if name == "meta" and "http-equiv" in tag)
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe-inline" not in policy.partition("script-src")[2] and policy.count("'sha256-") == 2
    for tag, attributes in parsed.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        assert attributes.get("src", "data:").startswith("data:")
        assert attributes.get("href", "#").startswith("#")
        assert not [name for name in attributes if name.startswith("on")]


def test_the_first_card_is_the_balanced_accuracy_with_the_number_of_test_images(parsed):
    cards = [value for tag, value in parsed.texts if tag in ("dt", "span")]
    first = cards.index("Balanced accuracy")
    assert re.fullmatch(r"\d+\.\d%", cards[first + 1]) and cards[first + 3] == "240 test images, 12 classes"
    prior = made_prior(12)
    for group in ("many", "medium", "few"):
        classes = prior.groups.count(group)
        assert f"{20 * classes} test images, {classes} {'class' if classes == 1 else 'classes'}" in cards


def test_the_page_shows_date_commit_and_parameters(parsed):
    shown = " ".join(value for _, value in parsed.texts)
    assert "Evaluated 2026-11-28 04:00 UTC, commit 0123abc+changes" in re.sub(" +", " ", shown)
    (recipe,) = (value for tag, value in parsed.texts if tag == "pre")
    assert yaml.safe_load(recipe) == params().model_dump(mode="json")


def test_warnings_are_above_the_metrics_and_first_in_the_next_steps():
    text = made_report(12, 30)  # 120 test images in each group: enough
    assert 'class="warning"' not in text
    warned = made_report(12, 20)
    box = re.search(r'<div class="warning" role="alert">(.*?)</div>', warned, re.DOTALL)
    assert "80 test images, fewer than 100" in box[1] and box.end() < warned.index('class="figures"')
    assert "Add test images first" in warned and "Add test images first" not in text


def test_learning_curves_show_all_epochs_and_omit_validation_without_data(content):
    loss = {trace["name"]: trace for trace in content["figures"]["loss"]["data"]}
    assert loss["student"]["x"] == [1, 2, 3, 4, 5] and loss["student"]["y"] == [6.0, 3.0, 2.0, 1.5, 1.2]
    assert content["figures"]["loss"]["layout"]["xaxis"]["dtick"] == 1, "no tick between epochs"
    assert [trace["y"] for trace in content["figures"]["validation"]["data"]] == [[0.5] * 5] * 2
    without = made_report(12, 20, validation=False)
    assert '"validation":' not in without and 'id="loss"' in without and "There is no validation split." in without


def test_the_confusion_matrix_equals_scikit_learns_and_keeps_the_classes_with_most_errors():
    from sklearn.metrics import confusion_matrix as reference

    for classes in (12, 80):
        prior, labels = made_prior(classes), np.repeat(np.arange(classes), 5)
        predicted = made_logits(labels, prior, 3, skill=3.0).argmax(1)
        matrix = confusion_matrix(predicted, labels, prior)
        shown = [prior.classes.index(name) for name in matrix.classes]
        assert len(shown) == min(classes, 30) and shown == sorted(shown)  # counts fall with the index
        full = reference(labels, predicted, labels=range(classes))
        assert (np.array(matrix.counts) == full[np.ix_(shown, shown)]).all() and matrix.tested == [5] * len(shown)
        mistakes = full.sum(0) + full.sum(1) - 2 * full.diagonal()
        hidden = set(range(classes)) - set(shown)
        assert not hidden or max(mistakes[list(hidden)]) <= min(mistakes[shown])


def test_a_class_name_is_text_and_never_a_tag(text, parsed, content):
    scripts = [tag for tag, _ in parsed.tags if tag == "script"]
    assert len(scripts) == 3 and text.count("<script") == 3 + text.count('"<script')
    assert [row[0] for row in content["classes"]][: len(HOSTILE)] == HOSTILE
    shown = " ".join(value for _, value in parsed.texts)
    assert HOSTILE[0] in shown and "49" not in [value for _, value in parsed.texts]
    hovered = [name for trace in content["figures"]["long-tail"]["data"] for name in trace["text"]]
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; &lt;br&gt;" in hovered  # plotly interprets <b>, so names are escaped


def test_json_cannot_end_its_script_element():
    hostile = {"</script><!--<script>": ["\u2028", "&amp;", "<![CDATA["]}
    script = str(as_script(hostile))
    assert not re.search("[<>&\u2028]", script) and json.loads(script) == hostile
    with pytest.raises(ValueError, match="not JSON compliant"):
        as_script(float("nan"))


def test_headline_and_groups_are_the_metrics_of_the_evaluation(made):
    labels, prior, logits = made
    analysis = analyse_predictions({"teacher": logits[:, ::-1], "student": logits}, labels, prior, 15, 0, draws=1)
    expected = prediction_metrics(
        adjusted_probabilities(logits, np.array(prior.log_prior), 0.0),
        labels,
        prior.groups,
        np.full(12, 1 / 12),
        bins=15,
        top_k=5,
    )
    assert analysis.headline["all classes"].value == pytest.approx(expected["balanced_accuracy"])
    for group in ("many", "medium", "few"):
        estimate = analysis.headline[group]
        assert estimate.value == pytest.approx(expected[group]) and estimate.low < estimate.value < estimate.high
    assert analysis.headline["ece"].value == pytest.approx(expected["ece"])
    assert {row["network"] for row in analysis.groups} == {"teacher", "student"}


def test_the_strength_sweep_equals_the_metrics_at_0_and_1(made):
    labels, prior, logits = made
    rows = {row.strength: row for row in strength_sweep(logits, labels, prior)}
    assert list(rows) == STRENGTHS.tolist() and {0.0, 1.0} < set(rows)
    for strength in (0.0, 1.0):
        p = adjusted_probabilities(logits, np.array(prior.log_prior), strength)
        for name, target in (("balanced", np.full(12, 1 / 12)), ("train", np.array(prior.p))):
            metrics = prediction_metrics(p, labels, prior.groups, target, bins=15, top_k=5)
            assert getattr(rows[strength], name) == pytest.approx(metrics["at_target_prior"]["all"])
        assert rows[strength].few == pytest.approx(metrics["few"])


def test_the_temperature_is_fitted_only_with_validation_data(made):
    labels, prior, logits = made
    sharp = 6 * logits
    fitted = fit_served_temperature(6 * made_logits(labels, prior, 9), labels)
    calibration = reliability(sharp, labels, fitted.temperature, 15)
    assert calibration.temperature > 2 and calibration.after.ece.value < calibration.before.ece.value
    assert sum(each.count for each in calibration.after.bins) == len(labels)
    assert reliability(sharp, labels, None, 15).after is None


def test_confusion_pairs_and_extreme_classes_have_the_correct_counts():
    prior = Prior(list("abcd"), [50, 40, 30, 20], [0.25] * 4, [-1.4] * 4, ["medium"] * 4)
    labels = np.repeat([0, 1, 2, 3], 5)
    predicted = np.array([0, 0, 0, 0, 1, 2, 2, 2, 1, 1, 2, 2, 2, 2, 2, 0, 3, 3, 3, 3])
    pairs = confusion_pairs(predicted, labels, prior)
    assert (pairs[0].actual, pairs[0].predicted, pairs[0].count, pairs[0].share) == ("b", "c", 3, 0.6)
    assert pairs[0].rows == [5, 6, 7] and sum(pair.count for pair in pairs) == 5
    worst, best = extreme_classes(predicted, labels, prior)
    assert [row.name for row in worst] == ["b", "d"] and [row.name for row in best] == ["c", "a"]
    assert worst[0].predicted[:3] == ["c", "c", "c"] and worst[0].accuracy.value == 0.4
    assert confusion_pairs(labels, labels, prior) == []


def test_thumbnails_are_small_and_contain_only_pixels():
    def read(uri):
        return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/webp;base64,"))))

    large = Image.fromarray(np.asarray(picture(0, (900, 1200))))
    uri = thumbnail(encode(large, "JPEG", exif=b"Exif\x00\x00secret"))
    assert read(uri).size == (SIDE, 72) and len(uri) < 12_000 and b"secret" not in base64.b64decode(uri[23:])
    small = read(thumbnail(png(3))).convert("RGB")
    assert small.size == (96, 96) and np.array_equal(np.asarray(small)[::6, ::6], picture(3))
    with pytest.raises(ImageError):
        thumbnail(b"<svg onload=alert(1)>")


@pytest.mark.slow
def test_a_thousand_classes_add_less_than_600_kb_to_the_page(text):
    assert len(made_report(1000, 1)) < len(text) + 600_000
    assert len(text) < 5_500_000  # plotly.js has 4.8 million


def test_without_plotly_the_page_has_a_note_and_its_tables(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    bare = Page(made_report.__wrapped__(12, 3))
    assert any("the package plotly is not installed" in value for _, value in bare.texts)
    assert [tag for tag, _ in bare.tags].count("script") == 2


def test_a_template_with_a_missing_value_fails():
    with pytest.raises(jinja2.UndefinedError, match="is undefined"):
        render_page("compare.html.jinja", {})


def test_an_empty_group_has_no_value_and_a_class_without_test_images_removes_the_shift_table(made):
    labels, prior, logits = made
    rows = np.array(prior.groups)[labels] != "few"
    analysis = analyse_predictions(
        {"teacher": logits[rows], "student": logits[rows]}, labels[rows], prior, 15, 0, draws=1
    )
    assert analysis.headline["few"].value is None
    assert analysis.shift.rows == [] and "has no test sample" in analysis.shift.missing


def test_the_plot_files_have_the_columns_of_dvc_yaml(made, tmp_path):
    labels, prior, logits = made
    analysis = analyse_predictions({"teacher": logits, "student": logits}, labels, prior, 15, 0, draws=1)
    write_plots(analysis, tmp_path)
    names = {path.name: path.read_text().splitlines() for path in tmp_path.iterdir()}
    assert names["strength.csv"][0] == "strength,balanced,train,many,medium,few" and len(names["strength.csv"]) == 42
    assert names["groups.csv"][0] == "bar,network,group,accuracy,low,high" and len(names["groups.csv"]) == 9
    assert names["reliability.csv"][0] == "confidence,before,after,answers"
    assert names["shift.csv"][1].startswith("1.699,forward 50,0.")
    dvc = yaml.safe_load((ROOT / "dvc.yaml").read_text())
    for plot in (next(iter(plot.values())) for plot in dvc["plots"]):
        for path, columns in plot["y"].items():
            if path.startswith("artifacts/evaluation/plots/"):
                header = names[path.rpartition("/")[2]][0].split(",")
                assert {plot["x"], *([columns] if isinstance(columns, str) else columns)} <= set(header)


def metrics_with(**changes):
    values = {
        "all": 0.5, "many": 0.75, "medium": None, "few": 0.25, "balanced_accuracy": 0.5, "top5": 0.875, "nll": 1.25,
        "ece": 0.125, "at_target_prior": {"all": 0.625, "nll": 1.0, "ece": 0.1}, **changes,
    }  # fmt: skip
    return dict.fromkeys(("balanced", "train"), values)


def cells_of(card, header):
    lines = card.splitlines()
    start = lines.index(header) + 2
    rows = [line.replace("\\|", "PIPE").strip("|").split("|") for line in lines[start : start + 3]]
    return [[cell.strip() for cell in row] for row in rows]


NAMES = ["a|b", "two\nlines", "<script>x</script>"]
PRIOR = Prior(NAMES, [200, 50, 5], [0.7, 0.2, 0.1], [-0.3, -1.6, -2.3], ["many", "medium", "few"])
ROWS = [["aPIPEb", "200", "many"], ["two lines", "50", "medium"], ["&lt;script>x&lt;/script>", "5", "few"]]


def test_hugging_face_reads_the_model_card_and_every_class_has_a_row():
    card = made_model_card(PRIOR, metrics_with())
    read = ModelCard(card, ignore_metadata_errors=False)
    assert read.data.pipeline_tag == "image-classification" and read.data.library_name == "onnx"
    results = {result.metric_name: result.metric_value for result in read.data.eval_results}
    assert results["balanced accuracy, target prior balanced"] == 0.5 and len(results) == 6
    assert cells_of(card, "| class | training samples | group |") == ROWS
    assert any(line.startswith("| balanced | 50.0% | 75.0% | n/a | 25.0% |") for line in card.splitlines())


@pytest.mark.parametrize(("images", "bracket"), [(10, "n<1K"), (1000, "1K<n<10K"), (437_513, "100K<n<1M")])
def test_hugging_face_reads_the_data_card(images, bracket):
    source = "x: [y\n---\n- evil"
    recipe, sizes = params({"data.source": "folder", "data.location": source}), SplitSizes(images, 0, 0)
    card = data_card(recipe.data, data_facts(recipe.data, recipe.image, PRIOR, sizes), PRIOR, sizes)
    read = DatasetCard(card, ignore_metadata_errors=False)
    assert read.data.size_categories == [bracket] and read.data.task_categories == ["image-classification"]
    assert cells_of(card, "| class | training images | group |") == ROWS
    assert "folder at x: [y --- - evil" in read.text


def test_accuracy_is_split_by_groups_that_training_has_seen(made):
    labels, prior, logits = made
    names = [f"place {index % 5}" for index in range(len(labels))]
    analysis = analyse_predictions(
        {"teacher": logits, "student": logits}, labels, prior, 15, 0, draws=1, groups=(names, {"place 0", "place 3"})
    )
    for row, places in zip(analysis.seen, ({0, 3}, {1, 2, 4}), strict=True):
        chosen = np.array([index % 5 in places for index in range(len(labels))])
        hits = (logits.argmax(1) == labels)[chosen]
        by_class = [hits[labels[chosen] == label].mean() for label in np.unique(labels[chosen])]
        assert row.accuracy.value == pytest.approx(np.mean(by_class))
        assert (row.groups, row.images, row.classes) == (len(places), chosen.sum(), len(by_class))
