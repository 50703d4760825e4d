"""Suspected labels: likelihood without the image itself, planted errors in every shot group, copies, and the page."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import pipeline.embed
import pipeline.split
from models.networks.cosine_classifier import ImageClassifier
from models.networks.memory import choose_rows, leave_one_out
from models.prior import shot_group
from pipeline.labels.pages import write_suspects
from pipeline.labels.suspects import find_suspects, label_probabilities, label_scores, origin_folds
from pipeline.model_io.checkpoint import ModelConfig, save_model
from tests.support.clusters import clusters, labelled
from tests.support.data_commands import command
from tests.support.making import data_params, encode, write
from tests.support.small_encoder import tiny_encoder, tiny_params


@given(st.integers(0, 2**32 - 1), st.integers(4, 30), st.integers(2, 4), st.sampled_from([0.05, 0.1, 0.5]))
def test_the_likelihood_without_the_image_equals_a_sum_over_the_other_rows(seed, count, classes, tau):
    generator = np.random.default_rng(seed)
    features, labels = generator.normal(size=(count, 5)), generator.integers(0, classes, count)
    origin = generator.integers(0, count, count)
    rows = np.flatnonzero(generator.random(count) < 0.7)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    expected = np.full((count, classes), -np.inf)
    for image in range(count):
        for label in range(classes):
            own = [row for row in rows if labels[row] == label and origin[row] != origin[image]]
            if own:
                expected[image, label] = np.log(np.mean(np.exp(unit[own] @ unit[image] / tau)))
    if not len(rows):
        return
    tensors = (torch.from_numpy(value) for value in (features, labels, origin, np.arange(count), rows))
    actual = leave_one_out(*tensors, classes, (tau, 2 * tau))[0].numpy()
    np.testing.assert_allclose(actual, expected, atol=2e-4)


def test_large_classes_give_a_sample_of_rows_and_small_classes_all():
    labels = torch.tensor([0] * 50 + [1] * 3 + [2])
    rows = choose_rows(labels, 4, 20)
    assert torch.bincount(labels[rows]).tolist() == [16, 3, 1] and rows.tolist() == sorted(set(rows.tolist()))


def test_planted_errors_are_first_in_every_shot_group():
    features, labels, generator = clusters([150, 120, 60, 40, 25, 15, 12, 9, 6])
    wrong = torch.cat([(labels == label).nonzero()[0] for label in range(9)])
    wrong = torch.cat([wrong, torch.randperm(150, generator=generator)[:12]]).unique()
    planted = labels.clone()
    planted[wrong] = (labels[wrong] + 4) % 9
    suspects, fit = find_suspects(labelled(features, planted))
    groups = [shot_group(count) for count in torch.bincount(planted).tolist()]
    assert fit.images == len(labels)
    for group in ("many", "medium", "few"):
        expected = {index for index in wrong.tolist() if groups[int(planted[index])] == group}
        first = [suspect.index for suspect in suspects if suspect.group == group][: len(expected)]
        assert len(expected & set(first)) >= 0.9 * len(expected) and expected, group
    for suspect in suspects:
        assert suspect.probability < suspect.suggested_probability and suspect.label != suspect.suggested
    ranks = [suspect.rank for suspect in suspects if suspect.label == 0]
    assert ranks == list(range(1, len(ranks) + 1))


def test_labels_of_the_most_similar_class_are_found_too():
    """Pairs of classes whose centres are near: the likelihood alone ranks few of these errors among the first."""
    centres, labels, generator = clusters([120, 110, 60, 50, 24, 20], noise=0.15)
    features = centres + 0.0
    for first in (0, 2, 4):
        shift = features[labels == first].mean(0) - features[labels == first + 1].mean(0)
        features[labels == first + 1] += 0.5 * shift
    planted = labels.clone()
    wrong = torch.randperm(len(labels), generator=generator)[:16]
    planted[wrong] = labels[wrong] ^ 1
    images = labelled(features, planted)
    order = label_scores(label_probabilities(images)[0], planted).argsort()
    assert len(set(order[:16].tolist()) & set(wrong.tolist())) >= 14  # 12 by the likelihood alone


@given(st.integers(0, 2**32 - 1), st.integers(2, 40))
def test_images_of_one_origin_are_in_one_fold_and_each_class_is_in_every_fold(seed, count):
    generator = torch.Generator().manual_seed(seed)
    labels, origin = torch.arange(count) % 2, torch.randint(0, max(1, count // 2), (count,), generator=generator)
    fold = origin_folds(replace(labelled(torch.zeros(count, 2), labels), origin=origin), 5)
    assert all(len(fold[origin == each].unique()) == 1 for each in origin.unique())
    alone = origin_folds(labelled(torch.zeros(count, 2), labels), 5)
    sizes = torch.bincount(alone, minlength=5)
    assert sizes.max() - sizes.min() <= 1
    for label in (0, 1):
        own = torch.bincount(alone[labels == label], minlength=5)
        assert own.max() - own.min() <= 1


def test_the_only_image_of_a_class_is_a_suspect_if_it_looks_like_another_class_alone():
    features, labels, _ = clusters([40, 40, 1, 1])
    features[-1] = features[0] + 0.01  # class 3 has an image of class 0
    suspects, _ = find_suspects(labelled(features, labels))
    assert [suspect.label for suspect in suspects if suspect.label >= 2] == [3]
    assert next(suspect.suggested for suspect in suspects if suspect.label == 3) == 0


def test_copies_of_a_wrongly_labelled_image_do_not_support_each_other():
    features, labels, _ = clusters([40, 40])
    features[40:44] = features[0] + 0.001 * torch.randn(4, 24, generator=torch.Generator().manual_seed(1))
    alone = torch.arange(80)
    together = alone.clone()
    together[40:44] = 40
    found = [{s.index for s in find_suspects(labelled(features, labels, origin))[0]} for origin in (alone, together)]
    assert set(range(40, 44)) <= found[1] and not set(range(40, 44)) <= found[0]


def test_names_are_text_on_the_page_and_the_page_loads_nothing(tmp_path):
    features, labels, _ = clusters([30, 30])
    labels[0] = 1
    hostile = "<script>alert(1)</script>"
    images = replace(labelled(features, labels), sample_ids=[hostile] * 60, classes=[hostile, "=1+1"])
    suspects, _ = find_suspects(images)

    class Reader:
        def read(self, reference):
            return encode(np.zeros((8, 8, 3), np.uint8)) if reference != "image 0" else b"damaged"

    write_suspects(tmp_path / "out", suspects, images, Reader(), 5, "Features of a test.")
    page = (tmp_path / "out/index.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    assert "http" not in page.replace("http-equiv", "") and "default-src 'none'" in page and len(page) < 50_000
    rows = rows_of_csv(tmp_path / "out/suspects.csv")
    assert len(rows) == len(suspects) and rows[0]["class"] == "'=1+1"


def rows_of_csv(path):
    return list(csv.DictReader(Path(path).read_text(encoding="utf-8").splitlines()))


COLOURS = {"red": (200, 40, 40), "green": (40, 190, 60), "blue": (30, 60, 210)}


def coloured(name, seed):
    noise = np.random.default_rng(seed).integers(-30, 30, (32, 32, 3))
    return encode(Image.fromarray((np.array(COLOURS[name]) + noise).clip(0, 255).astype(np.uint8)))


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of coloured images with stored features, where one green image lies in the folder of blue ones."""
    monkeypatch.chdir(tmp_path)
    weights = tiny_encoder(tmp_path, monkeypatch)
    for offset, (name, count) in enumerate({"red": 30, "green": 24, "blue": 9}.items()):
        for number in range(count):
            write(tmp_path / f"images/{name}/{number}.png", coloured(name, 1000 * offset + number))
    write(tmp_path / "images/blue/wrong.png", coloured("green", 77))
    made = tiny_params(weights, tmp_path / "images")
    pipeline.split.run(made)
    pipeline.embed.run(made)
    return made


def test_the_commands_find_the_wrong_label_and_choose_images_of_the_small_class(tmp_path, project, capsys):
    assert command(tmp_path, project, "--json", name="suspects") == 0
    printed = json.loads(capsys.readouterr().out)
    rows = rows_of_csv("artifacts/suspects/suspects.csv")
    assert (rows[0]["sample_id"], rows[0]["class"], rows[0]["suggested"]) == ("blue/wrong.png", "blue", "green")
    assert printed["suspects"]["few"] >= 1 and "blue/wrong.png" in Path("artifacts/suspects/index.html").read_text()
    for number in range(20):
        write(tmp_path / f"pool/{number}.png", coloured("blue" if number % 5 == 0 else "red", 5000 + number))
    write(tmp_path / "pool/copy.png", coloured("blue", 5000))
    write(tmp_path / "pool/known.png", (tmp_path / "images/blue/0.png").read_bytes())
    write(tmp_path / "pool/damaged.jpg", b"no image")
    assert command(tmp_path, project, "pool", "--budget", "4", "--for", "blue", "--json", name="next") == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["images"], printed["skipped"]) == (20, 3)
    assert {Path(file).stem for file in printed["files"]} == {"0", "5", "10", "15"}
    rows = rows_of_csv("artifacts/next/next.csv")
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4"] and rows[0]["classes"].startswith("blue ")


def test_a_wrong_group_or_folder_names_what_is_allowed(tmp_path, project, capsys):
    write(tmp_path / "pool/0.png", coloured("blue", 1))
    assert command(tmp_path, project, "pool", "--for", "rare", name="next") == 2
    assert "--for is 'rare'; expected many, medium, few, all, or the name of a class" in capsys.readouterr().err
    assert command(tmp_path, project, "nowhere", name="next") == 2
    assert "nowhere: is not a folder" in capsys.readouterr().err


def test_without_an_encoder_the_features_are_those_of_the_student(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for offset, (name, count) in enumerate({"red": 14, "green": 12}.items()):
        for number in range(count):
            write(tmp_path / f"images/{name}/{number}.png", coloured(name, 1000 * offset + number))
    write(tmp_path / "images/red/wrong.png", coloured("green", 77))
    made = data_params(tmp_path / "images")
    pipeline.split.run(made)
    assert command(tmp_path, made, name="suspects") == 2
    assert "artifacts/student/config.json: no such file; run `dvc repro student` first" in capsys.readouterr().err
    torch.manual_seed(0)
    model, image = ImageClassifier("resnet20", 2, 1 / 30, 16), made.image
    config = ModelConfig("resnet20", 2, 1 / 30, image.size, image.mean, image.std)
    Path("artifacts/student").mkdir(parents=True)
    save_model(model.state_dict(), config, Path("artifacts/student"))
    assert command(tmp_path, made, "--json", name="suspects") == 0
    assert json.loads(capsys.readouterr().out)["features"] == "the student"
    assert rows_of_csv("artifacts/suspects/suspects.csv")[0]["sample_id"] == "red/wrong.png"
    write(tmp_path / "pool/1.png", coloured("green", 5000))
    assert command(tmp_path, made, "pool", "--for", "green", name="next") == 0
    assert "data next: 1 of 1 image, about 1 of green" in capsys.readouterr().out
