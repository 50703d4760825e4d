"""`tailor data pack`: the same image bytes and split from a few shards; atomic, also after interruptions."""

import hashlib
import json

import pyarrow.parquet
import pytest
import yaml

from pipeline import split
from pipeline.preparation import pack as data_pack
from pipeline.preparation.pack import pack
from pipeline.shared.errors import DataError, ParamsError
from pipeline.sources import open_source
from tests.support.data_commands import command
from tests.support.list_files import PLACES, tree
from tests.support.making import data_params, folder, write


def packed_params(made, packed):
    """Return the params that the command prints for a pack."""
    told = yaml.safe_load(packed.params_yaml())["data"]
    kept = {"validation_per_class": made.data.validation_per_class, "test_per_class": made.data.test_per_class}
    return data_params(told["location"], told["source"], table=told["table"], **kept)


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


def test_a_shuffled_pack_holds_the_same_in_an_order_that_its_seed_alone_decides(tmp_path):
    made = data_params(folder(tmp_path / "photos", {"train/bee": 9, "train/ant": 7, "test/ant": 2, "test/bee": 3}))
    names = {}
    for output, shuffle in (("plain", None), ("once", 0), ("again", 0), ("other", 1)):
        pack(made, tmp_path / output, 4_000, shuffle=shuffle)
        names[output] = [
            pyarrow.parquet.read_table(path, columns=["name"]).column("name").to_pylist()
            for path in sorted((tmp_path / output / "train").iterdir())
        ]
    assert contents(tmp_path / "once") == contents(tmp_path / "again")
    flat = {output: [name for shard in found for name in shard] for output, found in names.items()}
    assert sorted(flat["once"]) == sorted(flat["plain"]) == sorted(flat["other"])
    assert flat["plain"] == sorted(flat["plain"]) != flat["once"] != flat["other"]
    # Both classes in the first shard.
    assert len({name.split("/")[1] for name in names["once"][0]}) == 2


def test_a_packed_data_set_is_still_known_by_its_name(tmp_path, capsys):
    made = data_params(tree(tmp_path / "places", PLACES), "places_lt")
    packed = pack(made, tmp_path / "packed", 1 << 20)
    again = packed_params(made, packed)
    assert open_source(again.data).origin == "places_lt" and open_source(again.data).classes[0] == "a/airfield"
    assert command(tmp_path, again) == 1
    assert "places_lt as published" in capsys.readouterr().out


def test_the_summary_names_the_sha256_of_every_shard(tmp_path):
    packed = pack(data_params(tree(tmp_path / "places", PLACES), "places_lt"), tmp_path / "packed", 1)
    summary = json.loads((tmp_path / "packed/pack.json").read_text())
    shards = sorted((tmp_path / "packed").rglob("*.parquet"))
    assert len(shards) == sum(packed.shards.values()) == 12
    assert summary["sha256"] == {
        p.relative_to(tmp_path / "packed").as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in shards
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "places"]


def test_an_interrupted_pack_goes_on_and_gives_the_same_bytes(tmp_path, monkeypatch):
    made = data_params(folder(tmp_path / "photos", {"train/bee": 40, "train/ant": 40, "test/ant": 2}))
    pack(made, tmp_path / "whole", 20_000)
    original, reads = data_pack._read, []

    def interrupted(source, row):
        reads.append(row.sample_id)
        if len(reads) == 70:
            raise KeyboardInterrupt
        return original(source, row)

    monkeypatch.setattr(data_pack, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack(made, tmp_path / "packed", 20_000, jobs=1)
    assert not (tmp_path / "packed").exists()
    before = len(reads)
    pack(made, tmp_path / "packed", 20_000, jobs=1)
    assert len(reads) - before < 82, "whole shards are not made again"
    assert contents(tmp_path / "packed") == contents(tmp_path / "whole")


def test_a_run_of_another_source_or_size_starts_anew(tmp_path, monkeypatch):
    made = data_params(folder(tmp_path / "photos", {"bee": 4, "ant": 4}))
    monkeypatch.setattr(
        data_pack,
        "write_json",
        lambda path, value: (
            (_ for _ in ()).throw(OSError(28, "No space left on device"))
            if path.name == "pack.json"
            else path.write_text(json.dumps(value))
        ),
    )
    with pytest.raises(OSError, match="No space left"):
        pack(made, tmp_path / "packed", 1)
    monkeypatch.undo()
    assert pack(made, tmp_path / "packed", 1 << 20).shards == {"train": 1}


def test_bad_images_stop_the_pack_or_are_left_out_and_listed(tmp_path):
    root = folder(tmp_path / "photos", {"bee": 4, "ant": 4})
    (root / "ant/lost.png").symlink_to(root / "nowhere.png")
    with pytest.raises(DataError, match=r"1 of 9 images are missing, the first 1: .*ant/lost.png"):
        pack(data_params(root), tmp_path / "packed", 1 << 20)
    packed = pack(data_params(root, on_bad_image="skip"), tmp_path / "packed", 1)
    assert packed.skipped == 1 and packed.images == {"train": 8}
    assert json.loads((tmp_path / "packed/pack.json").read_text())["skipped"] == [
        f"{root}/ant/lost.png: No such file or directory"
    ]


def test_the_command_tells_a_script_what_it_packed(tmp_path, capsys):
    made = data_params(tree(tmp_path / "places", PLACES), "places_lt")
    assert command(tmp_path, made, str(tmp_path / "packed"), "--json", name="pack") == 0
    told = json.loads(capsys.readouterr().out)
    assert sum(told["images"].values()) == 12 and told["skipped"] == 0
    assert told["params"]["data"]["location"] == str(tmp_path / "packed") == told["output"]


def test_an_output_that_is_there_is_never_overwritten(tmp_path, capsys):
    root = folder(tmp_path / "photos", {"bee": 4, "ant": 4})
    write(tmp_path / "packed/mine.txt", b"precious")
    with pytest.raises(ParamsError, match=r"packed: exists already; remove it or give another folder"):
        pack(data_params(root), tmp_path / "packed", 1)
    assert command(tmp_path, data_params(root), str(tmp_path / "packed"), name="pack") == 2
    assert command(tmp_path, data_params(root), str(tmp_path / "other"), "--shard-size", "64M", name="pack") == 0
    out, err = capsys.readouterr()
    assert "data pack: 8 train in 1 shard " in out and "source: table" in out and "exists already" in err
    assert command(tmp_path, data_params(root), str(tmp_path / "third"), "--shard-size", "64T", name="pack") == 2
    assert "--shard-size is '64T'; expected bytes such as 64M or 1G" in capsys.readouterr().err
