"""Write the results of `data suspects` and `data next`: a CSV file with all rows and a page with pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.preprocess import ImageError
from pipeline.labels.features import LabelledImages
from pipeline.labels.next_images import Choice
from pipeline.labels.suspects import Suspect, by_group
from pipeline.report.page import render_page, thumbnail
from pipeline.shared.artifacts import as_csv, whole_folder, write_file
from pipeline.shared.errors import DataError
from pipeline.sources import ImageReader
from pipeline.sources.source import read_image_file
from serving.shared.terminal import counted

SUSPECTS, NEXT, PAGE = "suspects.csv", "next.csv", "index.html"


@dataclass(frozen=True)
class _Item:
    """A picture of the page: its title, lines below it, the name of the image, and a function that reads its bytes."""

    title: str
    lines: list[str]
    name: str
    read: Callable[[], bytes]


def write_suspects(
    folder: Path, suspects: Sequence[Suspect], images: LabelledImages, reader: ImageReader, show: int, about: str
) -> None:
    """Write suspects.csv and index.html with at most `show` pictures of each shot group to a folder, atomically."""
    names = images.classes
    rows = [
        (
            images.splits[each.index], images.sample_ids[each.index], names[each.label], each.group, str(each.rank),
            names[each.suggested], f"{each.probability:.4f}", f"{each.suggested_probability:.4f}",
        )
        for each in suspects
    ]  # fmt: skip
    columns = ["split", "sample_id", "class", "group", "rank", "suggested", "probability", "suggested_probability"]
    sections = []
    for group, members in by_group(list(suspects)).items():
        if members:
            shown = members[:show]
            of = f"the {len(shown)} least likely labels of {len(members):,}" if len(members) > show else "all of them"
            items = [_suspect_item(each, images, reader) for each in shown]
            text = f"{counted(len(members), 'image')} of classes with {group} images; {of}."
            sections.append(_section(group, f"{group.capitalize()}-shot classes", text, items))
    lines = [
        f"{counted(len(suspects), 'image')} of {len(images.labels):,} look more like another class than like the class of "
        "their label. Look at each picture: the label may be wrong, or the image may be unusual. Correct the source and run "
        "dvc repro; nothing was changed or removed.",
        about,
    ]
    page = _page("Images that may be labelled wrongly", lines, sections, "tailor data suspects")
    with whole_folder(folder) as output:
        write_file(output / SUSPECTS, as_csv(rows, columns))
        write_file(output / PAGE, page)


def _suspect_item(each: Suspect, images: LabelledImages, reader: ImageReader) -> _Item:
    reference = images.references[each.index]
    lines = [
        f"looks like {images.classes[each.suggested]} ({each.suggested_probability:.0%}; label {each.probability:.1%})",
        f"{images.splits[each.index]}, {each.rank}. of its class",
    ]
    return _Item(images.classes[each.label], lines, images.sample_ids[each.index], lambda: reader.read(reference))


def write_next(
    folder: Path, choices: Sequence[Choice], files: Sequence[Path], classes: Sequence[str], wanted: str, about: str
) -> None:
    """Write next.csv and index.html with the pictures of the chosen files to a folder, atomically."""
    rows, items = [], []
    for rank, choice in enumerate(choices, 1):
        named = [f"{classes[label]} {p:.0%}" for label, p in choice.classes]
        path = files[choice.index]
        rows.append((str(rank), str(path), f"{choice.hit:.4f}", f"{choice.gain:.6f}", "; ".join(named)))
        read = _reader_of(path)
        items.append(
            _Item(f"{rank}. {classes[choice.classes[0][0]]}?", [*named, f"{wanted}: {choice.hit:.0%}"], str(path), read)
        )
    columns = ["rank", "file", "probability_wanted", "gain", "classes"]
    expected = sum(choice.hit for choice in choices)
    lines = [
        f"{counted(len(choices), 'image')} of {len(files):,}, in the order in which to label them; {expected:.0f} of them are "
        f"expected to be of the wanted classes ({wanted}). Put each image into the folder of its class in the drop folder, "
        "then run tailor ingest.",
        about,
    ]
    section = _section("images", "Images", "The most useful first; the classes are guesses.", items)
    page = _page("Images to label next", lines, [section], "tailor data next")
    with whole_folder(folder) as output:
        write_file(output / NEXT, as_csv(rows, columns))
        write_file(output / PAGE, page)


def _reader_of(path: Path) -> Callable[[], bytes]:
    return lambda: read_image_file(path)


def _section(name: str, title: str, text: str, items: list[_Item]) -> dict[str, Any]:
    with ThreadPoolExecutor() as pool:
        uris = list(pool.map(_thumbnail, items))
    shown = [
        {"title": item.title, "lines": item.lines, "name": item.name, "uri": uri}
        for item, uri in zip(items, uris, strict=True)
    ]
    return {"id": name, "title": title, "text": text, "items": shown}


def _thumbnail(item: _Item) -> str | None:
    """Thumbnail of an image; None if its file has disappeared or was damaged since the features were computed."""
    try:
        return thumbnail(item.read())
    except (DataError, ImageError):
        return None


def _page(title: str, lines: list[str], sections: list[dict[str, Any]], command: str) -> str:
    data = {"figures": {}}
    return render_page("labels.html.jinja", data, title=title, lines=lines, sections=sections, command=command)
