"""`tailor data pack`: the same image bytes and split from a few shards; atomic, also after interruptions."""

import hashlib
import json

import pyarrow.parquet
import pytest
import yaml

from pipeline import split
from pipeline.preparation.pack import pack, read_image
from pipeline.shared.errors import DataError, ParamsError
from pipeline.sources import open_source
from tests.support.data_commands import command
from tests.support.list_files import PLACES, tree
from tests.support.making import data_params, folder, write


def packed_params(made, packed):
    """Return the params that the command prints for a pack."""
    printed = yaml.safe_load(packed.params_yaml())["data"]
    held_out = {"validation_per_class": made.data.validation_per_class, "test_per_class": made.data.test_per_class}
    return data_params(printed["location"], printed["source"], table=printed["table"], **held_out)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.*"))}


@pytest.mark.parametrize("shard_bytes", [1, 4_000, 1 << 30])
def test_the_pack_holds_the_same_bytes_and_gives_the_same_split(tmp_path, shard_bytes):
    made = data_params(folder(tmp_path / "photos", {"train/bee": 9, "train/ant": 7, "test/ant": 2, "test/bee": 3}))
    packed = pack(made, tmp_path / "packed", shard_bytes)
    assert packed.images == {"train": 16, "test": 5}
    assert (
        packed.shards
        == {1: {"train": 16, "test": 5}, 4_000: {"train": 4, "test": 1}, 1 << 30: {"train": 1, "test": 1}}[shard_bytes]
    )
    original, again = open_source(made.data), open_source(packed_params(made, packed).data)
    assert again.classes == original.classes == ["ant", "bee"]
    assert sorted((row.sample_id, row.label, row.split) for row in again.rows) == sorted(
        (row.sample_id, row.label, row.split) for row in original.rows
    )
    bytes_of = {row.sample_id: original.read(row.reference) for row in original.rows}
    assert {row.sample_id: again.read(row.reference) for row in again.rows} == bytes_of
    for params, out in ((made, "loose"), (packed_params(made, packed), "packed-split")):
        split.run(params, tmp_path / out)
    for name in ("train", "validation", "test"):
        columns = ["sample_id", "label", "sha256"]
        loose, again = (
            pyarrow.parquet.read_table(tmp_path / out / f"{name}.parquet", columns=columns)
            for out in ("loose", "packed-split")
        )
        assert loose.equals(again)


def test_a_shuffled_pack_has_the_same_rows_in_an_order_set_by_the_seed(tmp_path):
    made = data_params(folder(tmp_path / "photos", {"train/bee": 9, "train/ant": 7, "test/ant": 2, "test/bee": 3}))
    names = {}
    for output, shuffle in (("plain", None), ("once", 0), ("again", 0), ("other", 1)):
        pack(made, tmp_path / output, 4_000, shuffle=shuffle)
        names[output] = [
            pyarrow.parquet.read_table(path, columns=["name"]).column("name").to_pylist()
            for path in sorted((tmp_path / output / "train").iterdir())
        ]
    assert contents(tmp_path / "once") == contents(tmp_path / "again")
    flat = {output: [name for shard in shards for name in shard] for output, shards in names.items()}
    assert sorted(flat["once"]) == sorted(flat["plain"]) == sorted(flat["other"])
    assert flat["plain"] == sorted(flat["plain"]) != flat["once"] != flat["other"]
    # Both classes in the first shard.
    assert len({name.split("/")[1] for name in names["once"][0]}) == 2


def test_a_pack_keeps_the_name_of_its_data_set(tmp_path, capsys):
    made = data_params(tree(tmp_path / "places", PLACES), "places_lt")
    packed = pack(made, tmp_path / "packed", 1 << 20)
    again = packed_params(made, packed)
    assert open_source(again.data).origin == "places_lt" and open_source(again.data).classes[0] == "a/airfield"
    assert command(tmp_path, again) == 1
    assert "places_lt as published" in capsys.readouterr().out


def test_the_summary_has_the_sha256_of_every_shard(tmp_path):
    packed = pack(data_params(tree(tmp_path / "places", PLACES), "places_lt"), tmp_path / "packed", 1)
    summary = json.loads((tmp_path / "packed/pack.json").read_text())
    shards = sorted((tmp_path / "packed").rglob("*.parquet"))
    assert len(shards) == sum(packed.shards.values()) == 12
    assert summary["sha256"] == {
        p.relative_to(tmp_path / "packed").as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in shards
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "places"]


def test_an_interrupted_pack_resumes_and_gives_the_same_bytes(tmp_path):
    made = data_params(folder(tmp_path / "photos", {"train/bee": 40, "train/ant": 40, "test/ant": 2}))
    pack(made, tmp_path / "whole", 20_000)
    reads = []

    def interrupted(source, row):
        reads.append(row.sample_id)
        if len(reads) == 70:
            raise KeyboardInterrupt
        return read_image(source, row)

    with pytest.raises(KeyboardInterrupt):
        pack(made, tmp_path / "packed", 20_000, jobs=1, read=interrupted)
    assert not (tmp_path / "packed").exists()
    before = len(reads)
    pack(made, tmp_path / "packed", 20_000, jobs=1, read=interrupted)
    assert len(reads) - before < 82, "complete shards are not written again"
    assert contents(tmp_path / "packed") == contents(tmp_path / "whole")


def test_a_pack_with_another_shard_size_starts_from_scratch(tmp_path):
    made = data_params(folder(tmp_path / "photos", {"bee": 40, "ant": 40}))

    def failing(source, row):
        if row.sample_id.endswith("bee/039.png"):
            raise OSError(28, "No space left on device")
        return read_image(source, row)

    with pytest.raises(OSError, match="No space left"):
        pack(made, tmp_path / "packed", 1, read=failing)
    assert len(list(tmp_path.rglob("*.parquet"))) == 79, "the shards of all images before the error are complete"
    assert pack(made, tmp_path / "packed", 1 << 20).shards == {"train": 1}


def test_bad_images_stop_the_pack_or_are_skipped_and_listed(tmp_path):
    root = folder(tmp_path / "photos", {"bee": 4, "ant": 4})
    (root / "ant/lost.png").symlink_to(root / "nowhere.png")
    with pytest.raises(DataError, match=r"1 of 9 images are missing, the first 1: .*ant/lost.png"):
        pack(data_params(root), tmp_path / "packed", 1 << 20)
    packed = pack(data_params(root, on_bad_image="skip"), tmp_path / "packed", 1)
    assert packed.skipped == 1 and packed.images == {"train": 8}
    assert json.loads((tmp_path / "packed/pack.json").read_text())["skipped"] == [
        f"{root}/ant/lost.png: No such file or directory"
    ]


def test_the_command_prints_its_result_as_json(tmp_path, capsys):
    made = data_params(tree(tmp_path / "places", PLACES), "places_lt")
    assert command(tmp_path, made, str(tmp_path / "packed"), "--json", name="pack") == 0
    printed = json.loads(capsys.readouterr().out)
    assert sum(printed["images"].values()) == 12 and printed["skipped"] == 0
    assert printed["params"]["data"]["location"] == str(tmp_path / "packed") == printed["output"]


def test_an_existing_output_is_never_overwritten(tmp_path, capsys):
    root = folder(tmp_path / "photos", {"bee": 4, "ant": 4})
    write(tmp_path / "packed/notes.txt", b"precious")
    with pytest.raises(ParamsError, match=r"packed: exists already; remove it or give another folder"):
        pack(data_params(root), tmp_path / "packed", 1)
    assert command(tmp_path, data_params(root), str(tmp_path / "packed"), name="pack") == 2
    assert command(tmp_path, data_params(root), str(tmp_path / "other"), "--shard-size", "64M", name="pack") == 0
    out, err = capsys.readouterr()
    assert "data pack: 8 train in 1 shard " in out and "source: table" in out and "exists already" in err
    assert command(tmp_path, data_params(root), str(tmp_path / "third"), "--shard-size", "64T", name="pack") == 2
    assert "--shard-size is '64T'; expected bytes such as 64M or 1G" in capsys.readouterr().err
