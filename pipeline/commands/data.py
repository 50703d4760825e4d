"""`tailor data`: check a data set, pack it into shards, list suspected labels and the images to label next."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands.options import ParamsOption
from pipeline.shared.artifacts import PARAMS_FILE
from pipeline.shared.errors import ParamsError
from serving.commands.options import AsJson, Debug
from serving.shared.terminal import Console, counted, print

if TYPE_CHECKING:
    from pipeline.preparation.check import DataReport

UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3}
CHECK = """\b
Examples:
  tailor data check                           the data of params.yaml; figures to artifacts/data_check/
  tailor data check --near 2                  only copies that are almost identical count as near duplicates
  tailor data check --json | jq .list_hash    the hash to compare with a colleague's

After an interruption the same command resumes; run again, it reads only files that changed. Exit status 1 when `split`
would refuse the data, when images of two splits are duplicates or near duplicates, or when a known data set differs from
what was published. Too few test images are a warning."""
PACK = """\b
Examples:
  tailor data pack data/packed                      shards of about 256 MiB
  tailor data pack data/packed --shard-size 1G      fewer, larger ones
  tailor data pack data/packed --shuffle 0          in random order: for data that training streams

After an interruption the same command resumes after the last whole shard. It prints the lines for params.yaml that read
the pack."""
SUSPECTS = """\b
Examples:
  tailor data suspects                        pictures in artifacts/suspects/index.html, all rows in suspects.csv
  tailor data suspects --json | jq .suspects

Needs the stored features of an encoder (`dvc repro embed`), or without an encoder the trained student. Changes nothing."""
NEXT = """\b
Examples:
  tailor data next photos/unlabelled --budget 200 --for few
  tailor data next photos/unlabelled --for 'sea otter'

Then put the chosen images into class folders below data/drop, and run `tailor ingest`."""
JobsOption = Annotated[
    int | None, typer.Option(min=1, max=1024, metavar="N", help="Images read at a time; by the cores if not given.")
]

app = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Check, pack, find wrong labels, rank images to label.",
    epilog="Example: tailor data check, then: tailor data pack data/packed",
)


@app.command(epilog=CHECK)
def check(
    output: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("artifacts/data_check"),
    near: Annotated[
        str,
        typer.Option(
            metavar="BITS|off",
            help="Bits of 64 in which the perceptual hashes of near duplicates may differ: 0 to 10, or off.",
        ),
    ] = "4",
    allow_duplicates: Annotated[
        bool,
        typer.Option(
            "--allow-duplicates",
            help="Exit status 0 although duplicates or near duplicates are in two splits; they are still reported.",
        ),
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Read every image again.")] = False,
    params: ParamsOption = PARAMS_FILE,
    jobs: JobsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print report.json instead of tables.")] = False,
    debug: Debug = False,
) -> int:
    """Report what is wrong with the data, and draw the long tail. Adds the folder of the data to .gitignore."""
    from pipeline.params import load_params
    from pipeline.preparation import check as data_check
    from pipeline.preparation import check_report as data_report
    from pipeline.preparation.project import keep_out_of_git

    if near != "off" and not (near.isdecimal() and int(near) <= 10):
        raise ParamsError(f"--near is {near!r}; expected 0 to 10, or off")
    journal = output.with_name(f".{output.name}.jsonl")
    recipe = load_params(params)
    if "://" not in recipe.data.location:
        keep_out_of_git(Path(recipe.data.location))
    report = data_check.check(recipe, journal, None if near == "off" else int(near), jobs, fresh)
    data_report.write_report(report, output)
    if as_json:
        print((output / "report.json").read_text(encoding="utf-8"), end="")
    else:
        data_report.print_report(report, Console())
        print(f"data check: {_conclusion(report, allow_duplicates)} → {output}")
    return 1 if report.verdict or (report.problems and not allow_duplicates) else 0


def _conclusion(report: DataReport, allowed: bool) -> str:
    if report.verdict:
        return "failed"
    if not report.problems:
        return "passed"
    if allowed:
        return "passed, except for the duplicates above, which --allow-duplicates accepts"
    return "failed, see the problem above; remove the copies, or accept them with --allow-duplicates"


@app.command(epilog=PACK)
def pack(
    output: Annotated[Path, typer.Argument(help="Folder to write; must not exist yet.", show_default=False)],
    shard_size: Annotated[str, typer.Option(metavar="BYTES", help="Size of a shard, e.g. 64M or 1G.")] = "256M",
    shuffle: Annotated[
        int | None,
        typer.Option(min=0, max=2**32 - 1, metavar="SEED", help="Random order; the source's order if not given."),
    ] = None,
    params: ParamsOption = PARAMS_FILE,
    jobs: JobsOption = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write many small files into a few Parquet shards."""
    from pipeline.params import load_params
    from pipeline.preparation import pack as data_pack
    from pipeline.preparation.project import keep_out_of_git

    size = re.fullmatch(r"(\d+)([KMG]?)", shard_size)
    if not size or int(size[1]) == 0:
        raise ParamsError(f"--shard-size is {shard_size!r}; expected bytes such as 64M or 1G")
    packed = data_pack.pack(load_params(params), output, int(size[1]) * UNITS[size[2]], jobs, shuffle)
    keep_out_of_git(output)
    if as_json:
        print(json.dumps(packed.as_mapping(), indent=2, ensure_ascii=False))
    else:
        print(f"data pack: {packed}")
        print(packed.params_yaml())


@app.command(epilog=SUSPECTS)
def suspects(
    output: Annotated[Path, typer.Option(help="Folder of the result.")] = Path("artifacts/suspects"),
    show: Annotated[int, typer.Option(min=0, max=2000, help="Pictures of each shot group on the page.")] = 60,
    params: ParamsOption = PARAMS_FILE,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List images whose labels may be wrong, with a page of pictures."""
    from pipeline.labels.features import FeatureNetwork, labelled_images
    from pipeline.labels.pages import write_suspects
    from pipeline.labels.suspects import by_group, find_suspects
    from pipeline.params import load_params
    from pipeline.preparation.project import keep_out_of_git
    from pipeline.sources import open_reader

    recipe = load_params(params)
    keep_out_of_git(output)  # its page has pictures
    network = FeatureNetwork(recipe)
    images = labelled_images(network)
    listed, fit = find_suspects(images)
    about = f"Features of {network.name}; tau {fit.tau:.3g}, weight {fit.weight:.3g}."
    write_suspects(output, listed, images, open_reader(recipe.data), show, about)
    numbers = {group: len(members) for group, members in by_group(listed).items()}
    if as_json:
        result = {"output": str(output), "images": len(images.labels), "suspects": numbers, "features": network.name}
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        groups = ", ".join(f"{number:,} {group}" for group, number in numbers.items())
        total = counted(len(images.labels), "image")
        print(f"data suspects: {len(listed):,} of {total} ({groups}) → {output / 'index.html'}")


@app.command("next", epilog=NEXT)
def label_next(
    folder: Annotated[Path, typer.Argument(help="Folder of unlabelled images, at any depth.", show_default=False)],
    budget: Annotated[int, typer.Option(min=1, max=100_000, help="Number of images to choose.")] = 200,
    wanted: Annotated[
        str, typer.Option("--for", metavar="GROUP|CLASS", help="few, medium, many, all, or the name of a class.")
    ] = "few",
    output: Annotated[Path, typer.Option(help="Folder of the result.")] = Path("artifacts/next"),
    params: ParamsOption = PARAMS_FILE,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Rank unlabelled images by what their labels would add."""
    from pipeline.labels.features import FeatureNetwork, known_hashes, labelled_images
    from pipeline.labels.next_images import choose_images, wanted_classes
    from pipeline.labels.pages import write_next
    from pipeline.params import load_params
    from pipeline.preparation.project import keep_out_of_git
    from serving.client.images import image_files

    if not folder.is_dir():
        raise ParamsError(f"{folder}: is not a folder; expected one with images")
    recipe = load_params(params)
    for images_folder in (folder, output):
        keep_out_of_git(images_folder)
    network = FeatureNetwork(recipe)
    images = labelled_images(network, ["train"])
    classes = wanted_classes(wanted, images)
    pool, files, skipped = network.of_files(image_files(folder), set(known_hashes()))
    choices = choose_images(images, pool, classes, budget)
    write_next(output, choices, files, images.classes, wanted, f"Features of {network.name}.")
    expected = sum(choice.hit for choice in choices)
    if as_json:
        result = {
            "output": str(output), "images": len(files), "skipped": len(skipped), "chosen": len(choices),
            "expected_wanted": expected, "files": [str(files[choice.index]) for choice in choices],
        }  # fmt: skip
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        left_out = f"; {len(skipped):,} skipped, the first: {next(iter(skipped.values()))}" if skipped else ""
        print(
            f"data next: {len(choices):,} of {counted(len(files), 'image')}, about {expected:.0f} of {wanted}{left_out} → "
            f"{output / 'index.html'}"
        )
