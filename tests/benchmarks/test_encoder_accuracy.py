"""benchmarks.encoder_accuracy: smoke test of a complete comparison at a small size; no accuracy is asserted."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks import encoder_accuracy, encoder_projects, encoder_rows
from benchmarks.accuracy import merged
from benchmarks.feature_classifiers import knn, logistic_regression
from pipeline.text.stored import TextFeatures, write_text_features

SIZES = [12, 6, 4]  # images by class
SECTION = {"epochs": 1, "batch_size": 8}
STUDENT = {"adapter": 8, "projection_hidden": 8, "projection_dim": 8, "queue_total": 16, "beta": 1.0, "alpha": 0.0}
SMALL = {"teacher": SECTION, "student": {**SECTION, **STUDENT}}


def write_pack(path, sizes, seed):
    draw = np.random.default_rng(seed)
    rows = []
    for label, size in enumerate(sizes):
        for number in range(size):
            pixels = draw.integers(0, 60, (24, 24, 3), dtype=np.uint8) + np.uint8(60 * label)
            encoded = io.BytesIO()
            Image.fromarray(pixels).save(encoded, "jpeg")
            rows.append({"image": encoded.getvalue(), "label": label, "name": f"{label}/{seed}-{number}.jpg"})
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    write_pack(tmp_path / "plankton-train.parquet", SIZES, 0)
    write_pack(tmp_path / "plankton-test.parquet", [2, 2, 2], 1)
    full = encoder_projects.project_params
    monkeypatch.setattr(encoder_accuracy, "project_params", lambda *arguments: merged(full(*arguments), SMALL))
    for key, value in SECTION.items():
        monkeypatch.setitem(encoder_projects.TUNED_STUDENT, key, value)
    return ["plankton", "--data", str(tmp_path), "--size", "32", "--work", str(tmp_path / "work")]


@pytest.mark.end_to_end
def test_every_row_is_computed_for_every_seed_and_an_interrupted_comparison_resumes(
    arguments, tmp_path, capsys, monkeypatch
):
    pytest.importorskip("sklearn")
    monkeypatch.delitem(encoder_rows.SECOND_STAGES, "tau-normalisation")  # needs 30 validation images
    encoder_accuracy.main([*arguments, "--seeds", "0", "--rows", "L_cls"])
    assert "seed 0, L_cls\n" in capsys.readouterr().out
    encoder_accuracy.main([*arguments, "--seeds", "0", "1", "--output", str(tmp_path / "table.md")])
    second = capsys.readouterr().out
    assert "seed 0, L_cls\n" not in second and "seed 1, L_cls\n" in second
    report = (tmp_path / "table.md").read_text()
    cells = dict(re.findall(r"^\| ([^|]+) \| ([\d.]+(?: ± [\d.]+)?) \|", report, re.MULTILINE))
    assert list(cells) == [row.name for row in encoder_accuracy.rows()]
    assert "±" in cells["L_cls"] and "±" not in cells["kNN"]
    # A cell is the mean of the stored results.
    stored = [json.loads(path.read_text())["test"]["all"] for path in tmp_path.glob("work/*/runs/GML-[0-9a-f]*.json")]
    assert len(stored) == 2 and cells["GML"].startswith(f"{50 * sum(stored):.2f}")


@pytest.mark.end_to_end
def test_a_memory_with_a_row_for_each_image_is_the_memory_alone_and_one_with_fewer_is_another(arguments, tmp_path):
    names = ["memory alone", *(f"memory alone, {rows} rows" for rows in (3, 22))]
    encoder_accuracy.main([*arguments, "--rows", *names, "--memory-rows", "3", "22"])
    fits = {
        path.name.rpartition("-")[0]: json.loads(path.read_text())["test"]
        for path in tmp_path.glob("work/*/runs/*.json")
    }
    assert fits["memory-alone"] == fits["memory-alone-22-rows"]
    assert set(fits) == {name.replace(" ", "-").replace(",", "") for name in names}


@pytest.mark.end_to_end
def test_networks_of_another_precision_are_trained_and_stored_separately(arguments, tmp_path, capsys):
    for precision in ("float32", "bfloat16", "bfloat16"):
        encoder_accuracy.main([*arguments, "--seeds", "0", "--rows", "L_cls", "--precision", precision])
    assert capsys.readouterr().out.count("seed 0, L_cls\n") == 2
    assert (
        len(list(tmp_path.glob("work/*/runs/L_cls-*.json"))) == len(list(tmp_path.glob("work/*/runs/teacher-*"))) == 2
    )


@pytest.mark.end_to_end
def test_post_hoc_adjustment_and_cross_entropy_are_one_network(arguments, tmp_path, capsys):
    encoder_accuracy.main([*arguments, "--seeds", "0", "--rows", "cross-entropy", "cross-entropy, post-hoc"])
    plain, adjusted = (json.loads(path.read_text())["test"] for path in sorted(tmp_path.glob("work/*/runs/c*.json")))
    assert plain["images"] == adjusted["images"]
    assert len(list(tmp_path.glob("work/*/runs/teacher-*"))) == 1
    capsys.readouterr()


@pytest.mark.end_to_end
def test_text_features_add_rows_that_depend_on_them(arguments, tmp_path, capsys):
    source = tmp_path / "text"

    def measured(seed):
        rows = F.normalize(torch.randn(4, 1280, generator=torch.Generator().manual_seed(seed)), dim=1).numpy()
        names = ("fish", "krill", "crab")  # of the classes 0, 1 and 2, which the table does not name
        text = TextFeatures(rows, np.array([0, 0, 1, 2]), names, (), {"encoder": "made", "sha256": "", "templates": []})
        write_text_features(source, text)
        chosen = ["zero-shot", "GML with text centres", "GML with image and text centres", "LWS"]
        encoder_accuracy.main([*arguments, "--text", str(source), "--seeds", "0", "--rows", *chosen])
        printed = capsys.readouterr().out
        assert all(f"| {row} |" in printed for row in chosen)
        return [row for row in chosen if f"seed 0, {row}\n" in printed]

    assert len(measured(0)) == 4 and measured(0) == [] and len(measured(1)) == 3


@pytest.mark.end_to_end
def test_rows_that_tune_the_encoder_train_on_images_and_are_optional(arguments, tmp_path, capsys):
    tuned = ["L_cls, last blocks", "GML, last blocks"]
    with pytest.raises(SystemExit):
        encoder_accuracy.main([*arguments, "--rows", *tuned])
    encoder_accuracy.main([*arguments, "--tuned", "--seeds", "0", "--rows", "L_cls", *tuned])
    printed = capsys.readouterr().out
    assert all(f"| {row} |" in printed for row in tuned)
    configs = [json.loads(path.read_text()) for path in tmp_path.glob("work/*/runs/student-*/config.json")]
    assert [(config["tune"], config["adapter"]) for config in configs] == [("last_blocks", 0)] * 2


def test_an_unknown_row_is_a_usage_error(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        encoder_accuracy.main([*arguments, "--rows", "gmll"])
    assert ended.value.code == 2
    assert "'gmll' is unknown; expected kNN, LogisticRegression balanced" in capsys.readouterr().err


def test_differences_are_paired_with_the_chosen_row(arguments, capsys):
    runs = {name: [{"test": dict.fromkeys(("all", "many", "medium", "few", "images"), value + seed / 10), "seconds": 1}
                   for seed in range(3)] for name, value in (("L_cls", 0.5), ("GML", 0.4))}  # fmt: skip
    lines = encoder_accuracy.table(runs, against="GML").splitlines()
    assert "all, against GML" in lines[0] and "+10.00" in lines[2] and lines[3].endswith("|  | 1 |")
    with pytest.raises(SystemExit):
        encoder_accuracy.main([*arguments, "--rows", "L_cls", "--against", "GML"])
    assert "--against: 'GML' is not a row of the table; expected L_cls" in capsys.readouterr().err


def separable(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return 3 * torch.eye(len(sizes), 8)[labels] + 0.1 * torch.randn(len(labels), 8, generator=generator), labels


@pytest.mark.parametrize("classifier", [knn, logistic_regression])
def test_a_classifier_of_features_finds_separable_classes_on_validation_and_test(classifier):
    if classifier is logistic_regression:
        pytest.importorskip("sklearn")
    (train, labels), (validation, targets), (test, expected) = (
        separable(sizes, seed) for seed, sizes in enumerate([[30, 5, 2], [2, 2, 2], [4, 4, 4]])
    )
    logits = classifier(train, labels, validation, targets, test, 3)
    assert (logits[0].argmax(1) == targets.numpy()).all() and (logits[1].argmax(1) == expected.numpy()).all()


def test_knn_weighs_a_vote_by_the_cosine_and_divides_by_the_images_of_its_class():  # pragma: allowlist secret
    train, labels = torch.tensor([[1.0, 0], [1, 0], [0.8, 0.6]]), torch.tensor([0, 0, 1])
    image = torch.tensor([[0.96, 0.28]])  # cosine .96 to class 0, .936 to class 1
    logits, _ = knn(train, labels, image, torch.tensor([0]), image, 2)
    assert logits[0, 0] - logits[0, 1] == pytest.approx((0.96 - 0.936) / 0.07, abs=1e-4)
