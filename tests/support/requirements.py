"""The locks in requirements/, and the transitive closure of requirements from the metadata of the installed packages."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
DISTRIBUTIONS = {canonicalize_name(distribution.name) for distribution in metadata.distributions()}


def tailor_with(extra: str = "") -> set[str]:
    """Return the names of the distributions that Tailor with an extra installs."""
    return installed_with([f"{PROJECT['name']}[{extra}]"])


def locked(name: str) -> list[Requirement]:
    """Return the requirements of requirements/{name}.txt. Raises AssertionError if one has no exact version or no hash."""
    entries = (ROOT / f"requirements/{name}.txt").read_text(encoding="utf-8").replace("\\\n", "").splitlines()
    found = []
    for entry in entries:
        if not entry.startswith("#"):
            text, *hashes = entry.split("--hash=")
            assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", value.strip()) for value in hashes), entry
            found.append(Requirement(text))
            assert [part.operator for part in found[-1].specifier] == ["=="], entry
    return found


def installed_with(requirements: Sequence[str]) -> set[str]:
    """Return the names of the distributions that requirements install. Tailor's are read from pyproject.toml."""
    visited, remaining = set(), [Requirement(text) for text in requirements]
    while remaining:
        requirement = remaining.pop()
        extras = {"", *requirement.extras}
        for name, extra in {(canonicalize_name(requirement.name), extra) for extra in extras} - visited:
            visited.add((name, extra))
            needs = [Requirement(text) for text in _needs(name, extra)]
            remaining += [need for need in needs if need.marker is None or need.marker.evaluate({"extra": extra})]
    return {name for name, _ in visited}


def _needs(name: str, extra: str) -> Sequence[str]:
    if name == PROJECT["name"]:
        return PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    return metadata.requires(name) or [] if name in DISTRIBUTIONS else []
