"""Sentences of each class: its words in prompt templates, and its descriptions."""

from __future__ import annotations

import csv
import io
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
    """Sentences of each class in the order of the classes, at least one. remarks: what was left out, a line each."""

    sentences: list[list[str]]
    remarks: list[str]


def is_code(name: str) -> bool:
    """Whether a class name is a number or a code such as n01440764, that has no meaning for a text encoder."""
    return CODE.fullmatch(name.strip()) is not None


def class_sentences(text: TextParams, classes: Sequence[str]) -> ClassSentences:
    """Make the sentences of all classes: each template with each word, then the descriptions; equal sentences once.

    Raises ParamsError for a missing file, DataError that names the class or the file: a class without words or sentences,
    an empty description, a table with a class twice.
    """
    words = read_words(text.names, classes) if text.names else [[name.replace("_", " ")] for name in classes]
    described, remarks = _descriptions(text.descriptions, classes) if text.descriptions else ({}, [])
    result, problems, longer = [], [], []
    for name, own in zip(classes, words, strict=True):
        filled = [template.replace("{}", " ".join(word.split())) for template in text.templates for word in own]
        sentences = list(dict.fromkeys([*filled, *described.get(name, [])]))
        if not sentences:
            problems.append((Path(f"{text.descriptions}/{name}.txt"), "no such file, and text.templates is empty"))
        if len(sentences) > text.max_sentences:
            longer.append(name)
        result.append(sentences[: text.max_sentences])
    raise_problems(Path(text.descriptions or "text"), problems)
    if longer:
        remarks.append(
            f"the first {text.max_sentences} sentences (text.max_sentences) are used of {counted(len(longer), 'class')} "
            f"with more, such as {longer[0]!r}"
        )
    if not text.names and text.templates and (codes := [name for name in classes if is_code(name)]):
        remarks.append(
            f"warning: class names that are codes, not words: {len(codes):,}, such as {codes[0]!r}; "
            "set text.names to a table with words"
        )
    return ClassSentences(result, remarks)


def read_words(names: ClassWordsParams, classes: Sequence[str]) -> list[list[str]]:
    """Read the words of each class from a CSV file, in the order of `classes`; rows of other classes are ignored.

    Raises ParamsError for a missing file or column, DataError for a class without a row or words, or with two rows.
    """
    path = Path(names.file)
    reader = csv.DictReader(io.StringIO(_read(path, "text.names.file"), newline=""), strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: {error}") from None
    for key, column in (("class_column", names.class_column), ("text_column", names.text_column)):
        if column not in (reader.fieldnames or []):
            has = ", ".join(reader.fieldnames or [])
            raise ParamsError(f"text.names.{key} is {column!r}, but the columns of {path} are {has or 'none'}")
        if list(reader.fieldnames or []).count(column) > 1:
            raise DataError(f"{path}: has more than one column {column!r}; rename all but one")
    table: dict[str, list[str]] = {}
    for row in rows:
        name = class_key((row[names.class_column] or "").strip())
        if name in table:
            raise DataError(f"{path}: class {name!r} has two rows; expected one")
        cell = class_key(row[names.text_column] or "")
        parts = cell.split(names.separator) if names.separator else [cell]
        table[name] = [part.strip() for part in parts if part.strip()]
    missing = "has no row in this file" if table else "has no row: the file is empty"
    raise_problems(
        path,
        [
            (path, f"class {name!r} {'has no words' if name in table else missing}")
            for name in classes
            if not table.get(name)
        ],
    )
    return [table[name] for name in classes]


def _descriptions(folder: str, classes: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Sentences of folder/<class>.txt of each class that has this file, and remarks."""
    root = Path(folder)
    try:
        files = {class_key(path.stem): path for path in sorted(root.iterdir()) if path.suffix == ".txt"}
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
