"""Sentences of each class: its words in prompt templates, and its descriptions."""

from __future__ import annotations

import csv
import io
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from models.prior import class_key
from pipeline.params import ClassWordsParams, TextParams
from pipeline.shared.errors import DataError, ParamsError, raise_problems
from serving.shared.terminal import counted

LARGEST_FILE = 16 * 2**20  # bytes of a table or a description
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*|\n+")
# Names that are no words: `17`, `n01440764`, `class12`, `c_3`, `label-0004`.
CODE = re.compile(r"(n|c|id|cat|cls|class|label|category)?[ _-]*\d+", re.IGNORECASE)


@dataclass(frozen=True)
class ClassSentences:
    """Sentences of each class in the order of the classes, at least one.

    remarks: what was left out, a line each. unused: number of sentences above max_sentences.
    """

    sentences: list[list[str]]
    remarks: list[str]
    unused: int


def is_code(name: str) -> bool:
    """Whether a class name is a number or a code such as n01440764, that has no meaning for a text encoder."""
    return CODE.fullmatch(name.strip()) is not None


def class_sentences(text: TextParams, classes: Sequence[str]) -> ClassSentences:
    """Make the sentences of all classes; equal sentences once, of more than text.max_sentences the first ones.

    Sentences of templates alternate with those of the description, so that a limit shortens both alike. Raises ParamsError
    for a missing file, DataError that names the class or the file: a class without words or sentences, an empty
    description, a table with a class twice.
    """
    words, described, remarks = [[name.replace("_", " ")] for name in classes], dict[str, list[str]](), list[str]()
    source = text.descriptions or "text"
    if text.names:
        words, described, remarks = read_table(text.names, classes)
        source = text.descriptions or text.names.file
    if text.descriptions:
        of_files, more = _descriptions(text.descriptions, classes)
        described = {name: described.get(name, []) + of_files.get(name, []) for name in classes}
        remarks += more
    result, problems, unused = [], [], dict[str, list[str]]()
    for name, own in zip(classes, words, strict=True):
        both = itertools.zip_longest(filled_templates(text.templates, own), described.get(name, []))
        sentences = list(dict.fromkeys(sentence for pair in both for sentence in pair if sentence is not None))
        if not sentences:
            problems.append((Path(source), f"class {name!r} has no description, and text.templates is empty"))
        if rest := sentences[text.max_sentences :]:
            unused[name] = rest
        result.append(sentences[: text.max_sentences])
    raise_problems(Path(source), problems)
    total = sum(map(len, unused.values()))
    if unused:
        name, rest = next(iter(unused.items()))
        of_descriptions = sum(len({*own} & {*described.get(name, [])}) for name, own in unused.items())
        remarks.append(
            f"{counted(total, 'sentence', 'are')} not used, {of_descriptions:,} of them from descriptions: "
            f"{counted(len(unused), 'class')} with more than {text.max_sentences} (text.max_sentences), such as {name!r}, "
            f"whose first unused sentence is {rest[0]!r}"
        )
    if not text.names and text.templates and (codes := [name for name in classes if is_code(name)]):
        remarks.append(
            f"warning: class names that are codes, not words: {len(codes):,}, such as {codes[0]!r}; "
            "set text.names to a table with words"
        )
    return ClassSentences(result, remarks, total)


def filled_templates(templates: Sequence[str], words: Sequence[str]) -> list[str]:
    """Each template with each word, once; in any number of first sentences each template, and each word, is used as often."""
    words = [" ".join(word.split()) for word in words]
    # Both turn at once. After lcm sentences the pairs repeat, so the words are shifted by one.
    period = math.lcm(len(templates), len(words))
    return [
        templates[number % len(templates)].replace("{}", words[(number + number // period) % len(words)])
        for number in range(len(templates) * len(words))
    ]


def read_table(
    names: ClassWordsParams, classes: Sequence[str]
) -> tuple[list[list[str]], dict[str, list[str]], list[str]]:
    """Read a CSV file; rows of other classes are ignored. Returns the words of each class in the order of `classes`, the
    sentences of names.description_column by class, and remarks.

    Raises ParamsError for a missing file or column, DataError for a class without a row or words, with two rows or with
    cells that have no column.
    """
    path = Path(names.file)
    reader = csv.DictReader(io.StringIO(_read(path, "text.names.file"), newline=""), strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: {error}") from None
    for key in ("class_column", "text_column", "description_column"):
        if (column := getattr(names, key)) not in (None, *(reader.fieldnames or [])):
            has = ", ".join(reader.fieldnames or [])
            raise ParamsError(f"text.names.{key} is {column!r}, but the columns of {path} are {has or 'none'}")
        if list(reader.fieldnames or []).count(column) > 1:
            raise DataError(f"{path}: has more than one column {column!r}; rename all but one")
    words, described = dict[str, list[str]](), dict[str, list[str]]()
    for row in rows:
        name = class_key((row[names.class_column] or "").strip())
        if name in words:
            raise DataError(f"{path}: class {name!r} has two rows; expected one")
        if any(row.get(None, ())):
            raise DataError(
                f"{path}: the row of class {name!r} has more cells than the header; put a cell with a comma in quotes"
            )
        cell = row[names.text_column] or ""
        parts = cell.split(names.separator) if names.separator else [cell]
        words[name] = [part.strip() for part in parts if part.strip()]
        if names.description_column:
            described[name] = split_sentences(row[names.description_column] or "")
    missing = "has no row in this file" if words else "has no row: the file is empty"
    problems = [
        (path, f"class {name!r} {'has no words' if name in words else missing}")
        for name in classes
        if not words.get(name)
    ]
    raise_problems(path, problems)
    remarks = []
    if empty := [name for name in classes if described and not described[name]]:
        remarks.append(f"{path}: no {names.description_column} of {counted(len(empty), 'class')}, such as {empty[0]!r}")
    return [words[name] for name in classes], described, remarks


def _descriptions(folder: str, classes: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Sentences of folder/<class>.txt of each class that has this file, and remarks."""
    root, files = Path(folder), dict[str, Path]()
    try:
        for path in sorted(path for path in root.iterdir() if path.suffix == ".txt"):
            if (other := files.setdefault(class_key(path.stem), path)) is not path:
                raise DataError(f"{folder}: {other.name!a} and {path.name!a} are of one class (Unicode NFC)")
    except OSError as error:
        raise ParamsError(
            f"text.descriptions is {folder!r}: {error.strerror}; expected a folder with <class>.txt"
        ) from None
    described = {name: split_sentences(_read(files[name], "text.descriptions")) for name in classes if name in files}
    raise_problems(root, [(files[name], "is empty; expected sentences") for name in described if not described[name]])
    remarks = []
    if missing := [name for name in classes if name not in files]:
        remarks.append(f"{folder}: no file for {counted(len(missing), 'class')}, such as {missing[0]!r}")
    if foreign := sorted(files.keys() - set(classes)):
        remarks.append(f"{folder}: {counted(len(foreign), 'file')} of no class, such as {files[foreign[0]].name!r}")
    return described, remarks


def split_sentences(text: str) -> list[str]:
    """Split a text at line ends and at . ! ? followed by a space (。！？ without); white space is collapsed."""
    return [sentence for part in SENTENCE_END.split(text) if (sentence := " ".join(part.split()))]


def _read(path: Path, key: str) -> str:
    """Text of a file, in Unicode's composed form. Raises ParamsError or DataError with the file."""
    try:
        if (size := path.stat().st_size) > LARGEST_FILE:
            raise DataError(f"{path}: has {size:,} bytes, above the limit of {LARGEST_FILE:,}")
        return class_key(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ParamsError(f"{key} is {str(path)!r}: {error.strerror}; expected a text file") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not UTF-8; convert it to UTF-8") from None
