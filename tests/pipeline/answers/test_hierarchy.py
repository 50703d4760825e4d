"""Hierarchical accuracy: against a plain loop, and the taxonomy through the stage split."""

import json
from pathlib import Path

import numpy as np
import pytest

from models.taxonomy import read_taxonomy
from pipeline import split
from pipeline.answers.hierarchy import LEVELS, taxonomy_record
from pipeline.data.class_prior import Prior
from pipeline.data.split_tables import load_taxonomy
from pipeline.shared.errors import DataError, ParamsError
from tests.support.making import data_params, folder

CLASSES = ["ant", "bee", "cat", "dog", "fern"]
TABLE = "name,parent\nant,insects\nbee,insects\ncat,mammals\ndog,mammals\ninsects,animals\nmammals,animals\nanimals,\nfern,\n"
COUNTS = [200, 50, 8, 30, 150]


def test_the_record_equals_a_plain_loop():
    taxonomy = read_taxonomy(TABLE, CLASSES)
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(5), [9, 7, 3, 5, 4])
    logits = generator.normal(size=(28, 5)) + 1.5 * np.eye(5)[labels]
    groups = ["many", "medium", "few", "medium", "many"]
    p = np.array(COUNTS) / sum(COUNTS)
    record = taxonomy_record(taxonomy, logits, labels, Prior(CLASSES, COUNTS, p.tolist(), np.log(p).tolist(), groups))
    names = {name: index for index, name in enumerate(taxonomy.names)}
    above = {c: {names[n] for n in chain} for c, chain in enumerate([
        ("insects", "animals"), ("insects", "animals"), ("mammals", "animals"), ("mammals", "animals"), (),
    ])}  # fmt: skip
    below = {node: [c for c in range(5) if c == node or node in above[c]] for node in range(8)}
    q = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    levels = {"insects": 2, "mammals": 2, "animals": 1}
    depth = [1 + len(above[n]) if n < 5 else levels[taxonomy.names[n]] for n in range(8)]
    for row, level in zip(record["levels"], LEVELS, strict=True):
        right, at_class, size = [], [], []
        for image, label in enumerate(labels):
            reached = [node for node in range(8) if q[image, below[node]].sum() >= level]
            node = max(reached, key=lambda n: (depth[n], q[image, below[n]].sum()), default=None)
            members = below[node] if node is not None else range(5)
            right.append(label in members)
            at_class.append(node is not None and node < 5)
            size.append(len(members))
        for key, values in (("correct", right), ("at_class", at_class), ("size", size)):
            means = [np.mean(np.array(values, float)[labels == c]) for c in range(5)]
            assert row[key]["all"] == pytest.approx(np.mean(means)) and row[key]["few"] == pytest.approx(means[2])
            assert row[key]["medium"] == pytest.approx(np.mean([means[1], means[3]]))
    best = logits.argmax(1)
    same_root = [(a == 4) == (b == 4) for a, b in zip(best, labels, strict=True)]
    assert record["roots"]["all"] == pytest.approx(
        np.mean([np.mean(np.array(same_root)[labels == c]) for c in range(5)])
    )
    assert record["classes"]["all"] <= record["parents"]["all"] <= record["roots"]["all"] and record["nodes"] == 3
    assert json.loads(json.dumps(record)) == record


def test_split_writes_the_taxonomy_and_refuses_a_wrong_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "source", dict.fromkeys(CLASSES, 5))
    Path("classes.csv").write_text(TABLE, encoding="utf-8")
    split.run(data_params(Path("source")))
    assert load_taxonomy() is None and not Path("data/split/taxonomy.json").exists()
    split.run(data_params(Path("source"), taxonomy="classes.csv"))
    taxonomy = load_taxonomy()
    assert taxonomy.names == [*CLASSES, "insects", "mammals", "animals"] and taxonomy.parents[4] == -1
    Path("classes.csv").write_text(TABLE.replace("fern,\n", ""), encoding="utf-8")
    with pytest.raises(DataError, match=r"^data.taxonomy: classes.csv: class 'fern' is missing"):
        split.run(data_params(Path("source"), taxonomy="classes.csv"))
    with pytest.raises(
        ParamsError, match=r"^data.taxonomy is 'no.csv': No such file or directory; expected a CSV file"
    ):
        split.run(data_params(Path("source"), taxonomy="no.csv"))
