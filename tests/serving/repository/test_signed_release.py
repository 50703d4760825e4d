"""Signed releases: any change is refused, in an export and in a repository; keys are rotated and revoked."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Release, write_export
from hypothesis import given
from hypothesis import strategies as st

from serving.commands.app import main
from serving.commands.serve import warn_unchecked
from serving.promotion.promotion import PromotionError, promote, rollback
from serving.repository.manifest import MANIFEST_NAME, ManifestError, load_manifest
from serving.repository.model_config import to_text
from serving.repository.release import find_releases, published_versions, read_release
from serving.repository.signature import SIGNATURE_NAME, SignatureError, verify_manifest
from serving.repository.signed_release import sign_export, sign_version
from serving.repository.signing_keys import TRUSTED_VARIABLE, PublicKey, read_private_key
from serving.repository.version_policy import read_config, serve_versions, served_versions
from serving.repository.writer import publish, write_repository
from serving.shared.errors import ServingError
from tests.support.signed import Signer

Trust = Callable[..., None]


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return Signer(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def signed(signer: Signer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signed") / "export"
    write_export(folder)
    return signer.sign(folder)


@pytest.fixture(scope="module")
def signed_second(signer: Signer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signed") / "second"
    write_export(folder, version=2)
    return signer.sign(folder)


@pytest.fixture
def trust(monkeypatch: pytest.MonkeyPatch) -> Trust:
    def set_keys(*keys: PublicKey) -> None:
        monkeypatch.setenv(TRUSTED_VARIABLE, ":".join(key.base64 for key in keys))

    return set_keys


@pytest.fixture
def root(signed: Path, tmp_path: Path) -> Path:
    return write_repository(signed, tmp_path / "repository")


def assert_refused(call: Callable[[], object], *parts: str) -> None:
    with pytest.raises(ServingError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_a_signed_release_is_published_promoted_and_rolled_back(
    root: Path, signed_second: Path, signer: Signer, trust: Trust
) -> None:
    trust(signer.public)
    assert promote(root, signed_second, rehearsal=False).version == 2
    assert [release.version for release in find_releases(root)] == [1, 2]
    assert rollback(root).version == 1
    assert promote(root, 2, rehearsal=False).version == 2
    # The repository numbers the version; the rest of the manifest keeps the signed bytes.
    text = (root / "classifier/2" / MANIFEST_NAME).read_bytes()
    assert text == (signed_second / MANIFEST_NAME).read_bytes()


def test_a_published_manifest_differs_from_the_signed_one_in_its_number_alone(
    root: Path, signer: Signer, trust: Trust, tmp_path: Path
) -> None:
    write_export(tmp_path / "export", version=7)
    export = signer.sign(tmp_path / "export")
    trust(signer.public)
    assert publish(export, root) == 2
    before, after = ((folder / MANIFEST_NAME).read_bytes() for folder in (export, root / "classifier/2"))
    assert after == before.replace(b'"version": 7,', b'"version": 2,')
    assert read_release(root, 2).manifest.version == 2


def test_an_unsigned_release_is_neither_published_nor_promoted_nor_rolled_back_to(
    root: Path, signed_second: Path, exports: dict[int, Release], signer: Signer, trust: Trust, monkeypatch
) -> None:
    unsigned = exports[3].export_dir
    trust(signer.public)
    assert_refused(lambda: promote(root, unsigned, rehearsal=False), str(unsigned), SIGNATURE_NAME, "tailor keys sign")
    assert published_versions(root) == [1]
    monkeypatch.delenv(TRUSTED_VARIABLE)
    promote(root, unsigned, rehearsal=False)
    promote(root, signed_second, rehearsal=False)
    trust(signer.public)
    for call in (lambda: rollback(root), lambda: rollback(root, 2, rehearsal=False), lambda: find_releases(root)):
        assert_refused(call, "classifier/2", SIGNATURE_NAME)
    assert served_versions(root, "classifier") == (2, 3)
    assert rollback(root, 1, rehearsal=False).version == 1


def test_a_promotion_unloads_a_champion_that_no_trusted_key_signed(
    exports: dict[int, Release], signed_second: Path, signer: Signer, trust: Trust, tmp_path: Path
) -> None:
    root = write_repository(exports[1].export_dir, tmp_path / "repository")
    trust(signer.public)
    assert promote(root, signed_second, rehearsal=False).previous == 1
    assert served_versions(root, "classifier") == served_versions(root, "student") == (2,)
    assert [release.version for release in find_releases(root)] == [2]


def test_a_published_unsigned_version_cannot_become_champion(
    root: Path, exports: dict[int, Release], signer: Signer, trust: Trust
) -> None:
    assert publish(exports[2].export_dir, root) == 2
    trust(signer.public)
    with pytest.raises(PromotionError, match=r"classifier/2/manifest\.json\.sig: no such file"):
        promote(root, 2, rehearsal=False)
    assert served_versions(root, "classifier") == (1,)


def test_keys_are_rotated_by_a_second_one_and_revoked_by_removal(
    root: Path, signed_second: Path, signer: Signer, trust: Trust, tmp_path: Path
) -> None:
    new = Signer(tmp_path, "new.pem")
    trust(new.public)
    assert_refused(lambda: find_releases(root), signer.public.id, new.public.id)
    trust(signer.public, new.public)
    assert promote(root, signed_second, rehearsal=False).version == 2
    # Version 1 is signed again with the new key; then the old one is revoked, and version 2 with it.
    sign_version(root, 1, read_private_key(new.path))
    trust(new.public)
    read_release(root, 1)
    assert_refused(lambda: read_release(root, 2), signer.public.id)
    assert rollback(root).version == 1
    assert_refused(lambda: promote(root, signed_second, rehearsal=False), signer.public.id)
    assert_refused(lambda: promote(root, 2, rehearsal=False), signer.public.id)


def test_a_release_that_is_published_already_gets_the_signature_of_its_export(
    signed: Path, signer: Signer, trust: Trust, tmp_path: Path
) -> None:
    unsigned = shutil.copytree(signed, tmp_path / "export")
    (unsigned / SIGNATURE_NAME).unlink()
    root = write_repository(unsigned, tmp_path / "repository")
    trust(signer.public)
    assert_refused(lambda: find_releases(root), "not signed")
    assert publish(signed, root) == 1
    assert [release.version for release in find_releases(root)] == [1]


@pytest.mark.parametrize("value", ["é" * 44, "A" * 87, "A" * 85 + "B==", "not base64", "A" * 84 + "=A=="])
def test_a_signature_that_is_not_64_bytes_in_base64_is_refused(
    signed: Path, signer: Signer, tmp_path: Path, value: str
) -> None:
    folder = shutil.copytree(signed, tmp_path / "export")
    content = json.loads((folder / SIGNATURE_NAME).read_text()) | {"signature": value}
    for ascii_only in (True, False):
        text = json.dumps(content, indent=2, ensure_ascii=ascii_only) + "\n"
        (folder / SIGNATURE_NAME).write_text(text, encoding="utf-8")
        assert_refused(lambda: verify_manifest(folder, [signer.public]), SIGNATURE_NAME, "is damaged")


@pytest.mark.parametrize("data", [b"", b"\xff\xfe" * 90, b" " * 2_000_000], ids=["empty", "not text", "large"])
def test_a_signature_file_of_any_bytes_is_refused(signed: Path, signer: Signer, tmp_path: Path, data: bytes) -> None:
    folder = shutil.copytree(signed, tmp_path / "export")
    (folder / SIGNATURE_NAME).write_bytes(data)
    assert_refused(lambda: verify_manifest(folder, [signer.public]), SIGNATURE_NAME, "is damaged")


@pytest.mark.parametrize("name", ["student.onnx", "golden.json"])
def test_a_manifest_that_lacks_a_file_cannot_be_signed(signed: Path, signer: Signer, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(signed, tmp_path / "export")
    root = write_repository(signed, tmp_path / "repository")
    paths = [folder / MANIFEST_NAME, *(root / model / "1" / MANIFEST_NAME for model in ("student", "classifier"))]
    content = json.loads(paths[0].read_text())
    del content["files"][name]
    for path in paths:
        path.write_text(json.dumps(content))
    key = read_private_key(signer.path)
    assert_refused(lambda: sign_export(folder, key), str(paths[0]), f"lacks {name}")
    assert_refused(lambda: sign_version(root, 1, key), str(paths[2]), f"lacks {name}")


def test_an_error_names_the_variable_or_the_key_of_the_params_that_lists_keys(
    signed: Path, signer: Signer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(signed, tmp_path / "export")
    for name in ("serving.trusted_keys", TRUSTED_VARIABLE):
        assert_refused(lambda: verify_manifest(signed, [Signer(tmp_path, f"{name}.pem").public]), f"{name} lists")  # noqa: B023
        monkeypatch.setenv(TRUSTED_VARIABLE, "set")
    (folder / SIGNATURE_NAME).unlink()
    assert_refused(lambda: verify_manifest(folder, [signer.public]), f"{TRUSTED_VARIABLE} lists keys")


def test_the_signature_of_another_release_is_refused(root: Path, signed_second: Path, signer: Signer, trust: Trust):
    trust(signer.public)
    shutil.copyfile(signed_second / SIGNATURE_NAME, root / "classifier/1" / SIGNATURE_NAME)
    assert_refused(lambda: read_release(root, 1), "classifier/1/manifest.json", "is not what key", signer.public.id)


def test_an_old_signed_release_stays_valid_under_a_new_number(root: Path, signer: Signer, trust: Trust) -> None:
    """A signature has no date and no place: docs/security.md says what that means."""
    for model in ("student", "classifier"):
        shutil.copytree(root / model / "1", root / model / "9")
        path = root / model / "9" / MANIFEST_NAME
        path.write_bytes(path.read_bytes().replace(b'"version": 1,', b'"version": 9,'))
    trust(signer.public)
    assert read_release(root, 9).version == 9


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("classifier/1/PIL.py", "import os"),
        ("classifier/1/extra.so", "x"),
        ("student/1/numpy/__init__.py", ""),
        ("classifier/triton_python_backend_stub", "#!/bin/sh"),
        ("student/initialise.sh", "x"),
    ],
)
def test_an_additional_file_that_could_run_is_refused(
    root: Path, signer: Signer, trust: Trust, name: str, content: str
) -> None:
    trust(signer.public)
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_text(content)
    assert_refused(lambda: find_releases(root), str(root / name).removesuffix("/__init__.py"), "remove it")


def add_version(root: Path, version: int) -> None:
    """Add a version with a model.py that no key signed; no config lists it."""
    for model in ("student", "classifier"):
        folder = shutil.copytree(root / model / "1", root / model / str(version))
        path = folder / MANIFEST_NAME
        path.write_bytes(path.read_bytes().replace(b'"version": 1,', b'"version": %d,' % version))
        (folder / "model.py").write_text("import os\n")


@pytest.mark.parametrize(
    "name",
    [
        "student/config.pbtxt",
        "student/configs/local.pbtxt",
        "classifier/config.pbtxt",
        "classifier/configs/local.pbtxt",
    ],
)
@pytest.mark.parametrize("policy", ["specific { versions: [1, 9] }", "latest { num_versions: 2 }", "all { }"])
def test_a_version_that_one_config_alone_lists_is_checked(
    root: Path, signer: Signer, trust: Trust, monkeypatch: pytest.MonkeyPatch, name: str, policy: str
) -> None:
    """A server reads one config of each model: it would load version 9, which the other configs do not list."""
    add_version(root, 9)
    trust(signer.public)
    assert [release.version for release in find_releases(root)] == [1]
    config = read_config(root / name)
    config.ClearField("version_policy")
    (root / name).write_text(f"{to_text(config)}version_policy {{ {policy} }}\n")
    assert_refused(lambda: find_releases(root), "/9/model.py", "sha256")
    monkeypatch.chdir(root.parent)
    assert main(["keys", "verify", str(root)]) == 1


@pytest.mark.parametrize("name", ["0", "01", "\uff11"])
def test_a_version_folder_that_tailor_does_not_write_is_refused(
    root: Path, signer: Signer, trust: Trust, name: str
) -> None:
    trust(signer.public)
    shutil.copytree(root / "student/1", root / "student" / name)
    assert_refused(lambda: find_releases(root), str(root / "student" / name), "remove it")


def test_an_empty_message_in_a_config_is_refused_in_one_line(root: Path, signer: Signer, trust: Trust) -> None:
    trust(signer.public)
    path = root / "classifier/config.pbtxt"
    path.write_text(path.read_text() + "optimization { }\n")
    assert_refused(lambda: find_releases(root), str(path), "optimization")


def test_promoting_the_champion_again_unlists_versions_that_no_key_signed(
    exports: dict[int, Release], signed_second: Path, signer: Signer, trust: Trust, tmp_path: Path
) -> None:
    root = write_repository(exports[1].export_dir, tmp_path / "repository")
    promote(root, signed_second, rehearsal=False)  # before keys were listed: both versions stay
    trust(signer.public)
    assert_refused(lambda: find_releases(root), "classifier/1", SIGNATURE_NAME)
    serve_versions(root, "classifier", (2,))  # as a promotion that was killed before its last step
    assert_refused(lambda: find_releases(root), "classifier/1", SIGNATURE_NAME)
    serve_versions(root, "classifier", (1, 2))
    assert promote(root, 2, rehearsal=False).version == 2
    assert served_versions(root, "classifier") == served_versions(root, "student") == (2,)
    assert [release.version for release in find_releases(root)] == [2]


def test_a_server_from_another_folder_reports_that_signatures_are_not_checked(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(TRUSTED_VARIABLE, raising=False)
    monkeypatch.chdir(root.parent)
    warn_unchecked(root, find_releases(root))
    printed = capsys.readouterr().err
    assert "signatures are not checked, although version 1 is signed" in printed
    assert str(root.parent / "params.yaml") in printed
    (root / "classifier/1" / SIGNATURE_NAME).unlink()
    warn_unchecked(root, find_releases(root))
    assert capsys.readouterr().err == ""


def test_byte_code_beside_the_models_is_refused(root: Path, signer: Signer, trust: Trust) -> None:
    trust(signer.public)
    (root / "classifier/1/__pycache__").unlink()
    (root / "classifier/1/__pycache__").mkdir()
    assert_refused(lambda: find_releases(root), "__pycache__")


def test_evidence_of_the_gate_may_stand_beside_a_release(root: Path, signer: Signer, trust: Trust) -> None:
    trust(signer.public)
    for name in ("decision.json", "predictions.parquet", "report.html"):
        (root / "classifier/1" / name).write_text("{}")
    assert len(find_releases(root)) == 1


@pytest.mark.parametrize("name", ["student/config.pbtxt", "student/configs/local.pbtxt", "classifier/config.pbtxt"])
@pytest.mark.parametrize(
    ("line", "field"),
    [
        ('parameters { key: "EXECUTION_ENV_PATH" value { string_value: "/tmp/x.tar.gz" } }', "parameters"),
        ('model_operations { op_library_filename: "/tmp/x.so" }', "model_operations"),
        (
            'optimization { execution_accelerators { gpu_execution_accelerator { name: "tensorrt" parameters '
            '{ key: "trt_extra_plugin_lib_paths" value: "/tmp/x.so" } } } }',
            "optimization",
        ),
    ],
)
def test_a_config_that_makes_triton_run_other_code_is_refused(
    root: Path, signer: Signer, trust: Trust, name: str, line: str, field: str
) -> None:
    trust(signer.public)
    path = root / name
    path.write_text(path.read_text() + line + "\n")
    assert_refused(lambda: find_releases(root), str(path), field)


def test_an_operator_may_change_the_number_of_instances_and_the_queue(root: Path, signer: Signer, trust: Trust) -> None:
    trust(signer.public)
    path = root / "classifier/configs/local.pbtxt"
    text = path.read_text().replace("count: 2", "count: 5")
    changed = text.replace("dynamic_batching {", "dynamic_batching { max_queue_delay_microseconds: 9")
    assert changed.count("count: 5") == 1
    assert "max_queue_delay" in changed
    path.write_text(changed)
    assert len(find_releases(root)) == 1


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_a_repository_for_each_device_is_accepted(
    signed: Path, signer: Signer, trust: Trust, tmp_path: Path, device: str
) -> None:
    trust(signer.public)
    assert len(find_releases(write_repository(signed, tmp_path / "repository", device))) == 1


def test_changed_labels_are_refused(root: Path, signer: Signer, trust: Trust) -> None:
    trust(signer.public)
    path = root / "student/labels.txt"
    path.write_bytes(path.read_bytes()[::-1])
    assert_refused(lambda: find_releases(root), str(path), "classes")


@pytest.mark.parametrize(
    "text",
    ["", "{}", "\xff", '{"format": 1, "key": "0123456789abcdef", "version": 1, "signature": "AA=="}\n', "x" * 99],
)
def test_a_damaged_signature_file_is_refused(root: Path, signer: Signer, trust: Trust, text: str) -> None:
    trust(signer.public)
    (root / "classifier/1" / SIGNATURE_NAME).write_bytes(text.encode("latin-1"))
    assert_refused(lambda: read_release(root, 1), SIGNATURE_NAME, "is damaged")


def test_a_release_without_the_hashes_of_the_code_is_not_signed(exports: dict[int, Release], signer: Signer) -> None:
    with pytest.raises(SignatureError, match="lacks the key runtime"):
        sign_export(exports[2].export_dir, read_private_key(signer.path))


def test_the_signature_file_names_the_key_and_holds_64_bytes(signed: Path, signer: Signer) -> None:
    content = json.loads((signed / SIGNATURE_NAME).read_text())
    assert content["key"] == signer.public.id
    signature = base64.b64decode(content["signature"])
    assert signer.public.verifies(signature, (signed / MANIFEST_NAME).read_bytes())


class Files:
    """The files of a release; check() raises ServingError if one of them has changed."""

    def __init__(self, paths: list[Path], check: Callable[[], object]) -> None:
        self.paths, self.check = paths, check


@pytest.fixture(scope="module")
def files(signed: Path, signer: Signer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    export = shutil.copytree(signed, tmp_path_factory.mktemp("flipped") / "export")
    root = write_repository(signed, tmp_path_factory.mktemp("flipped") / "repository")
    folders = [root / "student/1", root / "classifier/1"]

    def check_export() -> None:
        verify_manifest(export, [signer.public])
        load_manifest(export)

    def paths(*folders: Path) -> list[Path]:
        return [path for folder in folders for path in sorted(folder.iterdir()) if path.stat().st_size]

    return {
        "export": Files(paths(export), check_export),
        "repository": Files(paths(*folders), lambda: read_release(root, 1)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("place", ["export", "repository"])
@given(data=st.data())
def test_each_flipped_bit_of_each_file_is_refused(
    files: dict[str, Files], signer: Signer, place: str, data: st.DataObject
) -> None:
    path = data.draw(st.sampled_from(files[place].paths), label="file")
    content = path.read_bytes()
    index = data.draw(st.integers(0, len(content) - 1), label="byte")
    changed = bytearray(content)
    changed[index] ^= data.draw(st.integers(1, 255), label="bits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TRUSTED_VARIABLE, signer.public.base64)
        files[place].check()
        try:
            path.write_bytes(changed)
            with pytest.raises(ServingError):
                files[place].check()
        finally:
            path.write_bytes(content)


def test_each_flipped_byte_of_the_signature_file_and_of_the_version_number_is_refused(
    files: dict[str, Files], signer: Signer, trust: Trust
) -> None:
    trust(signer.public)
    for path in (
        path for each in files.values() for path in each.paths if path.name in (SIGNATURE_NAME, MANIFEST_NAME)
    ):
        content = path.read_bytes()
        check = next(each.check for each in files.values() if path in each.paths)
        for index in range(min(len(content), 400)):
            for bits in (1, 4, 32):
                path.write_bytes(content[:index] + bytes([content[index] ^ bits]) + content[index + 1 :])
                with pytest.raises((ManifestError, ServingError)):
                    check()
        path.write_bytes(content)
        check()
