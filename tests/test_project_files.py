"""Consistency of project files: the deps of dvc.yaml, a new project's files, the packages of the installation."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path

import grimp
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import Distribution, find_packages

from pipeline.params.release import ServingParams
from pipeline.shared import fingerprint
from serving.shared.version import TAILOR_VERSION
from tests.support.requirements import PROJECT, PYPROJECT, locked

ROOT = Path(__file__).parents[1]
ROOMS = ("models", "pipeline", "serving", "tailor")
PROJECT_FILES = ROOT / "pipeline/preparation/project_files"
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]

# No stage depends on these: they check values, write files, format errors. Nor on the modules in .dvcignore.
NO_DEPENDENCY = ("pipeline.command_line", "pipeline.params", "pipeline.shared", "serving.shared")
IGNORED = set((ROOT / ".dvcignore").read_text(encoding="utf-8").splitlines())
# Modules of stage `split`; later stages read its tables, which are dependencies.
SPLIT_ALONE = ("models.image_names", "pipeline.sources")
# The stages that read the taxonomy; the others import it only because split_tables reads all files of the split.
TAXONOMY_STAGES = ("split", "evaluate", "export")
# The optimiser step takes either objective; a change of the student's must not retrain the teacher.
STUDENT_ALONE = (
    "models.contrast", "models.objectives.concutmix", "models.objectives.contrast", "models.objectives.hybrid",
    "models.objectives.student", "models.objectives.student_weights", "pipeline.text",
)  # fmt: skip
# The code that trains a further seed also made artifacts/student, a dependency of stage `seeds`.
SEEDS_ALONE = ("pipeline.evaluation", "pipeline.seeds", "models.sample_size")
LICENCE_SHA256 = "ddacef491153f45022f5619519bb2016374a8c36e75153768493f45fb38d7992"
# Extras in `pip install -e '.[extra]'` and in calls of install_command.
INSTALL = re.compile(r"(?:pip install (?:-\S+ )*'[.\w/]*\[|install_command\()([\w\s,'\"-]+)[\])]")


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph(*ROOMS)


def within(module, packages):
    return any(module == package or module.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_all_code_that_can_change_its_result(stage, graph):
    module = f"pipeline.{stage}"
    excluded = NO_DEPENDENCY
    if stage != "split":
        excluded += SPLIT_ALONE
    if stage not in TAXONOMY_STAGES:
        excluded += ("models.taxonomy",)
    if stage == "teacher":
        excluded += STUDENT_ALONE
    imported = {name for name in {module, *graph.find_upstream_modules(module)} if not within(name, excluded)}
    if stage == "seeds":
        imported = {name for name in imported if within(name, SEEDS_ALONE)}
    deps = STAGES[stage]["deps"]
    missing = sorted(
        path
        for path in map(file_of, imported)
        if not any(path == dep or path.startswith(f"{dep}/") for dep in deps)
        and path not in IGNORED
        and not path.endswith("/__init__.py")
    )
    assert missing == []


def test_a_change_of_the_trusted_keys_alone_does_not_export_again():
    read = {name for name in STAGES["export"]["params"] if name.startswith("serving")}
    assert read == {f"serving.{field}" for field in ServingParams.model_fields} - {"serving.trusted_keys"}


def test_the_dvc_yaml_of_a_new_project_differs_only_by_code_hashes():
    new_project = yaml.safe_load((PROJECT_FILES / "stages.yaml").read_text(encoding="utf-8"))
    here = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
    code = new_project["stages"].pop("code")
    assert code["always_changed"] and code["cmd"].endswith(f"-m {fingerprint.__name__}")
    assert code["outs"] == [{f"{fingerprint.FOLDER}/{stage}": {"cache": False}} for stage in fingerprint.STAGES]
    assert list(here["stages"]) == list(new_project["stages"]) == list(fingerprint.STAGES)
    for name, stage in here["stages"].items():
        stage["deps"] = [f"{fingerprint.FOLDER}/{name}", *(dep for dep in stage["deps"] if not dep.startswith(ROOMS))]
        stage["cmd"] = stage["cmd"].replace("python", "python -P")
    assert new_project == here


def test_a_new_project_has_the_params_of_this_one():
    assert (PROJECT_FILES / "params.yaml").read_text() == (ROOT / "params.yaml").read_text()


def test_no_text_installs_tailor_from_an_index_and_each_extra_that_a_message_names_exists():
    """PyPI's `tailor` is another project."""
    extras = PROJECT["optional-dependencies"]
    folders = [*(ROOT / room for room in ROOMS), ROOT / "docs", ROOT / "benchmarks", ROOT / "data", ROOT / "recipes"]
    paths = [
        path for folder in folders for path in folder.rglob("*") if path.suffix not in (".pyc", ".png", ".parquet")
    ]
    paths += [path for path in ROOT.iterdir() if path.name != "CHANGELOG.md"]
    texts = {path: path.read_text(encoding="utf-8", errors="replace") for path in paths if path.is_file()}
    index = re.compile(r"\btailor\[[a-z]|pip install[^\n`]* tailor\b")
    assert [path.relative_to(ROOT).as_posix() for path, text in texts.items() if index.search(text)] == []
    named = {
        extra for text in texts.values() for call in INSTALL.findall(text) for extra in re.findall(r"[\w-]+", call)
    }
    assert {"serve", "monitor", "pipeline", "ray"} <= named <= set(extras)


def test_the_licence_and_the_citation_agree_with_the_distribution():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["license"], citation["version"]) == (PROJECT["license"], TAILOR_VERSION)
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    # sha256 of the text at apache.org/licenses/LICENSE-2.0.txt, without white space
    assert hashlib.sha256("".join(text.split()).encode()).hexdigest() == LICENCE_SHA256
    for name in ("NOTICE", "SECURITY.md", "CODE_OF_CONDUCT.md"):
        assert (ROOT / name).read_text(encoding="utf-8").strip()


def applies(requirement):
    return requirement.marker is None or requirement.marker.evaluate()


def test_each_requirement_of_pyproject_is_locked_with_hashes_at_a_version_that_it_allows():
    groups = (*PROJECT["optional-dependencies"].values(), *PYPROJECT["dependency-groups"].values())
    named = chain(PYPROJECT["build-system"]["requires"], PROJECT["dependencies"], *groups)
    wanted = [requirement for requirement in map(Requirement, named) if applies(requirement)]
    versions = {
        canonicalize_name(lock.name): str(lock.specifier).removeprefix("==")
        for lock in (*locked("development"), *locked("gpu"))
        if applies(lock)
    }
    refused = [
        str(requirement)
        for requirement in wanted
        if requirement.name != PROJECT["name"]
        and not requirement.specifier.contains(versions.get(canonicalize_name(requirement.name), "0"), prereleases=True)
    ]
    assert refused == []


@pytest.mark.parametrize("name", ["train", "server", "gateway", "container"])
def test_a_smaller_lock_holds_packages_of_the_development_lock_in_the_same_versions(name):
    small, large = ({(lock.name, str(lock.specifier)) for lock in locked(part)} for part in (name, "development"))
    assert small <= large


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_reports_a_moved_environment(tmp_path):
    """A link to the environment of another folder is not accepted."""
    (tmp_path / "here/bin").mkdir(parents=True)
    (tmp_path / ".venv").symlink_to("here")
    command = ["make", "-f", ROOT / "Makefile", "-C", tmp_path, "--no-print-directory", "not-moved"]
    for first_lines, status in (
        (f"#!{tmp_path}/here/bin/python3.11", 0),
        (f'#!/bin/sh\n\'\'\'exec\' "{tmp_path}/here/bin/python3" "$0" "$@"', 0),
        ("#!/nowhere/.venv/bin/python3.11", 2),
        (f"#!{sys.prefix}/bin/python", 2),
    ):
        (tmp_path / "here/bin/pip").write_text(f"{first_lines}\n")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == status, (first_lines, done.stderr)
    assert done.stderr.startswith(f"make: .venv was made as {sys.prefix} and works only there; run `make clean`")


def test_the_code_in_dvc_yaml_exists():
    code = {dep for stage in STAGES.values() for dep in stage["deps"] if dep.startswith(ROOMS)}
    assert [dep for dep in sorted(code) if not (ROOT / dep).exists()] == []


def test_every_folder_of_code_is_installed():
    settings = PYPROJECT["tool"]["setuptools"]
    installed = find_packages(ROOT, include=settings["packages"]["find"]["include"])
    folders = {path.parent for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    folders -= {ROOT / "serving/deploy"}  # data: its health check runs standalone in a container
    assert sorted(installed) == sorted(folder.relative_to(ROOT).as_posix().replace("/", ".") for folder in folders)


def test_the_installation_contains_the_types_and_every_data_file(monkeypatch):
    monkeypatch.chdir(ROOT)
    distribution = Distribution()
    distribution.parse_config_files()
    distribution.include_package_data = False  # only declared files, not those known to git or an older build
    build = distribution.get_command_obj("build_py")
    build.ensure_finalized()
    installed = {f"{package.replace('.', '/')}/{name}" for package, _, _, names in build.data_files for name in names}
    assert {"models/py.typed", "serving/py.typed", "tailor/py.typed"} <= installed
    beside = {
        path.relative_to(ROOT).as_posix()
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert sorted(beside - installed) == []


def file_of(module: str) -> str:
    """Return the file of a module of Tailor, relative to the project's root."""
    path = module.replace(".", "/")
    return f"{path}/__init__.py" if (ROOT / path).is_dir() else f"{path}.py"
