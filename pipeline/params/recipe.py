"""Apply a recipe: merge overlay files into params.yaml, keeping its comments."""

from __future__ import annotations

import copy
import difflib
import io
from pathlib import Path
from typing import Any

from pipeline.params import Params, parse_params, read_yaml
from pipeline.shared.errors import ParamsError

EXTENDS = "extends"
BY_KIND = (
    "teacher.loss",
    "teacher.classifier",
    "student.loss",
    "student.classifier",
    "student.contrast",
    "student.experts",
)
RECIPES = Path(__file__).with_name("recipes")  # in the repository a symbolic link to recipes/ at the root


def apply_recipe(overlays: list[Path], target: Path) -> tuple[str, list[str]]:
    """Merge overlays, in order, into the text of `target`. Returns the text and a line per changed key; writes no file.

    Raises ParamsError, with file, key and value, for an overlay that is not a mapping or gives invalid params.
    """
    from ruamel.yaml import YAML  # training runs without ruamel

    overlays = [existing_recipe(overlay) for overlay in overlays]
    read_yaml(target)  # raises the usual error if the file is not YAML
    document = load_document(target.read_text(encoding="utf-8"))
    applied: set[Path] = set()
    lines = [line for overlay in overlays for line in _merge(document, resolve(overlay, applied), "")]
    params = parse_params(YAML(typ="safe").load(dump_document(document)), overlays[-1])
    if params.encoder is not None:
        _complete(document, "encoder", params.encoder.model_dump(mode="json"))
    return dump_document(document), lines


def with_overlay(params: Params, overlay: Path) -> Params:
    """Params with the values of an overlay and of the files that it extends; writes no file. Raises as `apply_recipe`."""
    content = params.model_dump(mode="json")
    _merge(content, resolve(existing_recipe(overlay), set()), "")
    return parse_params(content, overlay)


def _complete(document: Any, name: str, values: dict[str, Any]) -> None:
    """Add the keys that a section lacks, because `dvc exp run -S` changes only keys that the file has."""
    section = document[name]
    missing = {key: value for key, value in values.items() if key not in section}
    if missing and section.fa.flow_style():
        section.fa.set_block_style()
        blank_lines = document.ca.items.pop(name, None)
        if blank_lines:
            section.ca.items[list(missing)[-1]] = blank_lines
    section.update(missing)


def find_recipe(path: Path) -> Path:
    """`path` if the file exists, else the recipe of that name in the package; `path` if neither exists."""
    shipped = RECIPES / (path.relative_to("recipes") if path.is_relative_to("recipes") else path)
    return shipped if shipped.is_file() and not path.exists() else path


def existing_recipe(path: Path) -> Path:
    """The file that `find_recipe` finds. Raises ParamsError, which names recipes of like names, if there is none."""
    found = find_recipe(path)
    if found.is_file():
        return found
    shipped = [each.relative_to(RECIPES).as_posix() for each in sorted(RECIPES.rglob("*.yaml"))]
    near = difflib.get_close_matches(path.as_posix().removeprefix("recipes/"), shipped, cutoff=0.5) or shipped[:3]
    raise ParamsError(f"{path}: no such recipe; expected a file, or a recipe of Tailor such as recipes/{near[0]}")


def flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to dotted keys."""
    values: dict[str, Any] = {}
    for key, value in section.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return values


def load_document(text: str, block_mappings: bool = False) -> Any:
    """Load a params file for editing, with its comments; block lists, as of `dvc exp run -S`, are put on one line.

    block_mappings: put each key of a section in braces or of an alias (`*name`) on its own line, so that editing one
    section changes no other.
    """
    document = _yaml().load(text)
    if block_mappings:
        document = _block(document)
    _lists_on_one_line(document)
    return document


def _block(mapping: Any) -> Any:
    """The mapping in block style, with a copy for each alias."""
    mapping = copy.copy(mapping)
    mapping.fa.set_block_style()
    mapping.yaml_set_anchor(None, always_dump=False)
    for key, value in mapping.items():
        if isinstance(value, dict):
            mapping[key] = _block(value)
        elif isinstance(value, list):
            mapping[key] = copy.copy(value)
            mapping[key].yaml_set_anchor(None, always_dump=False)
    return mapping


def dump_document(document: Any) -> str:
    """The text of an edited params file."""
    stream = io.StringIO()
    _yaml().dump(document, stream)
    return stream.getvalue()


def _yaml() -> Any:
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 160
    yaml.representer.add_representer(
        type(None), lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    return yaml


def _lists_on_one_line(mapping: Any) -> None:
    """Convert block lists to flow style and keep the key's comment; replacing a block list would break the file."""
    from ruamel.yaml.comments import CommentedMap, CommentedSeq

    for key, value in mapping.items():
        if isinstance(value, CommentedMap):
            _lists_on_one_line(value)
        elif (
            isinstance(value, CommentedSeq)
            and not value.fa.flow_style()
            and not any(isinstance(entry, CommentedMap | CommentedSeq) for entry in value)
        ):
            head = mapping.ca.items.pop(key, None)
            comments = [head[2]] if head and head[2] else []
            comments += [tokens[0] for _, tokens in sorted(value.ca.items.items()) if tokens and tokens[0]]
            mapping[key] = _flow(list(value))
            texts = [text.strip() for comment in comments for text in comment.value.splitlines()]
            if any(texts):
                mapping.yaml_add_eol_comment(" ".join(filter(None, texts)), key)


def resolve(overlay: Path, applied: set[Path], below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Merge an overlay's values over those of the files in its `extends`: one path or a list, relative to the overlay.

    A path `recipes/...` beside the overlay may be one of the package.

    Each file is applied once: a file in `applied` is skipped, so that it cannot undo later values; files read here are
    added to `applied`. below: the overlays that extend this one. Raises ParamsError for an overlay that cannot be read,
    that extends itself, or that extends a path that is not a file.
    """
    content = read_yaml(overlay)
    named = content.pop(EXTENDS, [])
    parents = [named] if isinstance(named, str) else named
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise ParamsError(f"{overlay}: {EXTENDS} is {named!r}; expected a file name or a list of them")
    values: dict[str, Any] = {}
    for parent in parents:
        path = find_recipe(overlay.parent / parent)
        if not path.is_file():
            raise ParamsError(f"{overlay}: {EXTENDS} is {parent!r}, but there is no file {path}")
        if path.resolve() in (overlay.resolve(), *below):
            raise ParamsError(f"{overlay}: {EXTENDS} is {parent!r}, which itself extends this file")
        if path.resolve() not in applied:
            _merge(values, resolve(path, applied, (overlay.resolve(), *below)), "")
    applied.add(overlay.resolve())
    _merge(values, content, "")
    return values


def _merge(document: Any, changes: dict[str, Any], prefix: str) -> list[str]:
    lines = []
    for key, value in changes.items():
        name = f"{prefix}{key}"
        if (
            isinstance(value, dict)
            and isinstance(document.get(key), dict)
            and not _another_kind(name, value, document[key])
        ):
            lines.extend(_merge(document[key], value, f"{name}."))
        elif key not in document or document[key] != value:
            lines.append(f"{name}: {document.get(key, 'unset')} → {value}")
            document[key] = _flow(value)
    return lines


def _another_kind(name: str, value: dict[str, Any], old: dict[str, Any]) -> bool:
    """Whether a section that is chosen by `kind` gets another kind, which would refuse the keys of the old one."""
    return name in BY_KIND and "kind" in value and value["kind"] != old.get("kind")


def _flow(value: Any) -> Any:
    """Convert a list or a new mapping to ruamel's flow style on one line."""
    from ruamel.yaml.comments import CommentedMap, CommentedSeq

    if isinstance(value, dict):
        made: Any = CommentedMap({key: _flow(entry) for key, entry in value.items()})
    elif isinstance(value, list):
        made = CommentedSeq(value)
    else:
        return value
    made.fa.set_flow_style()
    return made
