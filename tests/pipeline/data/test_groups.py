"""Groups that stay in one split: by column, path and near duplicates; compared with StratifiedGroupKFold of scikit-learn."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.model_selection import StratifiedGroupKFold

from pipeline import split
from pipeline.data.assignment import SPLITS, assign
from pipeline.data.groups import group_remarks, hold_out_groups
from pipeline.data.split_tables import read_groups, read_split
from pipeline.ingestion.ingest import ingest
from pipeline.params import Params
from pipeline.shared.errors import DataError, ParamsError
from tests.support.data_commands import scene
from tests.support.making import data_params, encode, params, png, rows_of, table, write


def data(**changes):
    settled = {"profile": "natural", "test_per_class": 5, "validation_per_class": 3, "validation_share": 0.2, **changes}
    return params({f"data.{key}": value for key, value in settled.items()}).data


def grouped(counts, places, seed):
    """Return rows and their groups: places of unequal size, each with some of the classes more often than others."""
    generator, rows = np.random.default_rng(seed), rows_of(counts)
    shares = generator.dirichlet(np.full(places, 0.7), len(counts))
    return rows, {row.reference: f"place {generator.choice(places, p=shares[row.label])}" for row in rows}


@given(
    st.lists(st.integers(1, 60), min_size=2, max_size=6), st.integers(1, 12), st.integers(0, 2**32 - 1),
    st.sampled_from(["natural", "step"]),
)  # fmt: skip
def test_no_group_is_in_two_splits_and_every_class_can_still_be_trained(counts, places, seed, profile):
    rows, groups = grouped(counts, places, seed)
    settings = data(profile=profile, imbalance_factor=1.0, seed=seed)
    assigned = assign(rows, list("abcdef"[: len(counts)]), settings, groups=groups)
    of_split = [{groups[row.reference] for row in assigned[name]} for name in SPLITS]
    assert not of_split[0] & of_split[1] and not of_split[0] & of_split[2] and not of_split[1] & of_split[2]
    assert {row.label for row in assigned["train"]} == set(range(len(counts)))
    assert assign(rows, list("abcdef"[: len(counts)]), settings, groups=groups) == assigned
    if profile == "natural":
        assert sorted(row.sample_id for part in assigned.values() for row in part) == sorted(r.sample_id for r in rows)
    own = [{groups[row.reference] for row in rows if row.label == label} for label in range(len(counts))]
    lonely = [label for label, names in enumerate(own) if len(names) == 1]
    assert not {row.label for row in assigned["test"]} & set(lonely)


def test_a_group_for_each_image_holds_out_as_many_images_as_no_groups():
    rows = rows_of([60, 30, 12, 8])
    alone = {row.reference: row.reference for row in rows}
    plain, single = (assign(rows, list("abcd"), data(), groups=groups) for groups in (None, alone))
    for name in SPLITS:
        assert (
            np.bincount([r.label for r in single[name]]).tolist()
            == np.bincount([r.label for r in plain[name]]).tolist()
        )


def distance(labels, held, classes):
    """Return half the sum of differences of class shares, and the largest difference of a class's held-out share from 1/5."""
    all_images, held_images = (np.bincount(part, minlength=classes) for part in (labels, labels[held]))
    shares = np.abs(all_images / len(labels) - held_images / held.sum()).sum() / 2
    return shares, np.abs(held_images / all_images - 0.2).mean()


def test_class_shares_are_as_near_to_the_whole_as_those_of_stratified_group_k_fold():
    ours, theirs = [], []
    for seed in range(12):
        rows, groups = grouped([400, 200, 100, 60, 40, 25], 40, seed)
        labels, names = np.array([row.label for row in rows]), np.array([groups[row.reference] for row in rows])
        codes = np.unique(names, return_inverse=True)[1]
        targets = (np.bincount(labels) // 5).tolist()
        everything, nothing = np.ones(len(rows), bool), np.zeros(len(rows), bool)
        held = hold_out_groups(labels, codes, targets, everything, nothing, np.random.default_rng(seed))
        ours.append(distance(labels, held, 6))
        folds = StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(labels, labels, names)
        theirs.append(np.mean([distance(labels, np.isin(np.arange(len(rows)), test), 6) for _, test in folds], axis=0))
    ours, theirs = np.mean(ours, axis=0), np.mean(theirs, axis=0)
    assert (ours <= theirs + 0.01).all() and ours[0] < 0.06 and ours[1] < 0.06, (ours, theirs)


def test_splits_of_the_source_are_unchanged_and_their_shared_groups_are_counted():
    rows = rows_of([10, 6]) + rows_of([2, 2], "test")
    groups = {row.reference: f"place {index % 4}" for index, row in enumerate(rows)}
    assigned = assign(rows, ["ant", "bee"], data(), groups=groups)
    assert [row.split for row in assigned["test"]] == ["test"] * 4
    assert not assigned["validation"]  # each group has images in the source's test split
    assert "4 groups are in more than one split of the source" in group_remarks(assigned, groups, ["ant", "bee"], 0)[-1]


def in_folder(tmp_path, monkeypatch, sizes, group, **changes):
    """Change into tmp_path, write images `place_number.png` in class folders, and return params."""
    monkeypatch.chdir(tmp_path)
    seed = 0
    for name, places in sizes.items():
        for place, count in places.items():
            for number in range(count):
                write(Path(f"source/{name}/{place}_{number}.png"), png(seed := seed + 1))
    made = data_params(Path("source"), group=group, **changes).model_dump(mode="json")
    made["ingest"] |= {"settle_seconds": 0}
    return Params.model_validate(made)


SIZES = {
    "ant": {"north": 6, "south": 5, "east": 2},
    "bee": {"north": 3, "west": 3, "east": 2},
    "cat": {"south": 7},
}


def test_a_regular_expression_on_the_path_keeps_places_together_and_the_lonely_class_is_named(
    tmp_path, monkeypatch, capsys
):
    made = in_folder(tmp_path, monkeypatch, SIZES, "path:/([a-z]+)_")
    result = split.run(made)
    assert "4 groups of images" in str(result)
    assert "1 class has no test image, as its groups are too few: cat (1 group)" in capsys.readouterr().err
    names = {name: set(read_groups(name)) for name in SPLITS}
    assert names["train"] | names["validation"] | names["test"] == {"north", "south", "east", "west"}
    assert not names["train"] & names["test"] and "south" in names["train"] and names["test"]
    for name in SPLITS:
        references = read_split(name, ["reference"]).column("reference").to_pylist()
        assert read_groups(name) == [reference.split("/")[1].split("_")[0] for reference in references]


def test_an_ingested_image_of_a_held_out_group_stays_out_of_training(tmp_path, monkeypatch, capsys):
    made = in_folder(tmp_path, monkeypatch, SIZES, "path:/([a-z]+)_")
    split.run(made)
    held, trained = read_groups("test")[0], read_groups("train")[0]
    for number, place in enumerate((held, trained, "elsewhere")):
        write(Path(f"data/drop/ant/{place}_9.png"), png(900 + number))
    before = {name: Path(f"data/split/{name}.parquet").read_bytes() for name in ("validation", "test")}
    assert ingest(made).added == 3
    assert split.run(made).ingested == 2
    assert f"is of group '{held}', which is in test" in Path("data/split/skipped.csv").read_text()
    assert "1 ingested image is in a split of the source already, or of a held-out group" in capsys.readouterr().err
    assert before == {name: Path(f"data/split/{name}.parquet").read_bytes() for name in before}
    assert {"elsewhere", trained} < set(read_groups("train")) and held not in read_groups("train")


def test_a_column_of_a_table_is_the_group_in_the_source_and_in_the_drop(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    patients = [f"p{index // 3}" for index in range(30)]
    columns = {"image": [png(seed) for seed in range(30)], "label": ["sick", "well"] * 15, "patient": patients}
    table(Path("source/train.parquet"), columns)
    made = data_params(Path("source"), "table", group="column:patient").model_dump(mode="json")
    made["ingest"] |= {"settle_seconds": 0}
    made = Params.model_validate(made)
    split.run(made)
    held = read_groups("test")[0]
    assert {held}.isdisjoint(read_groups("train"))
    new = {"image": [png(100), png(101)], "label": ["sick", "well"], "patient": [held, "p99"]}
    table(Path("data/drop/new.parquet"), new)
    assert ingest(made).added == 2 and split.run(made).ingested == 1
    assert "p99" in read_groups("train") and held not in read_groups("train")


def test_near_duplicates_are_in_one_split_also_when_they_are_ingested(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in range(16):
        for copy, quality in enumerate((90, 60)):
            write(Path(f"source/{'ab'[seed % 2]}/{seed}-{copy}.jpg"), encode(scene(seed), "JPEG", quality=quality))
    made = data_params(Path("source"), group="near").model_dump(mode="json")
    made["ingest"] |= {"settle_seconds": 0}
    made = Params.model_validate(made)
    split.run(made)
    scenes = {
        name: {Path(r).name.split("-")[0] for r in read_split(name, ["reference"]).column("reference").to_pylist()}
        for name in SPLITS
    }
    assert not scenes["train"] & scenes["test"] and not scenes["validation"] & scenes["test"] and scenes["test"]
    held = int(min(scenes["test"]))
    small = scene(held).resize((60, 60), Image.Resampling.BILINEAR)
    write(Path(f"data/drop/{'ab'[held % 2]}/again.jpg"), encode(small, "JPEG", quality=80))
    write(Path("data/drop/a/other.jpg"), encode(scene(99), "JPEG", quality=80))
    assert ingest(made).added == 2 and split.run(made).ingested == 1


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ("patient", "data.group is 'patient'.*none of near, column:NAME of a table, and path:REGEX"),
        ("path:([", "is not a regular expression"),
        ("column:", "none of near"),
    ],
)
def test_a_wrong_group_names_what_is_allowed(group, message):
    with pytest.raises(ParamsError, match=message):
        data(group=group)


def test_a_group_that_the_source_cannot_give_is_refused(tmp_path, monkeypatch):
    for group, error, message in (
        ("path:camera([0-9]+)", DataError, "gives no image a group; the first image is 'ant/east_0.png'"),
        ("column:place", ParamsError, "column 'place', but source folder is no table; use path:REGEX"),
    ):
        with pytest.raises(error, match=message):
            split.run(in_folder(tmp_path, monkeypatch, SIZES, group))
