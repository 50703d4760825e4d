"""Keys that sign releases: made, read, trusted; each unusable one is an error in one line."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from serving.repository.signing_keys import (
    KEY_VARIABLE,
    PASSPHRASE_VARIABLE,
    TRUSTED_VARIABLE,
    PublicKey,
    new_key,
    public_key_of,
    read_private_key,
    read_public_key,
    signing_key,
    trusted_keys,
)
from serving.shared.errors import InputError

# RFC 8032, section 7.1, test 2.
SEED = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
PUBLIC = bytes.fromhex("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")
MESSAGE = bytes.fromhex("72")
SIGNATURE = bytes.fromhex(
    "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
    "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
)


@pytest.fixture(autouse=True)
def no_keys_in_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (KEY_VARIABLE, PASSPHRASE_VARIABLE, TRUSTED_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def write_private_key(path: Path, key: object, mode: int = 0o600) -> Path:
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path.write_bytes(key.private_bytes(pem, pkcs8, serialization.NoEncryption()))
    path.chmod(mode)
    return path


def assert_refused(call: object, *parts: str) -> None:
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_the_vector_of_rfc_8032_is_accepted_and_no_other_signature() -> None:
    key = PublicKey(PUBLIC)
    assert public_key_of(ed25519.Ed25519PrivateKey.from_private_bytes(SEED)) == key
    assert key.verifies(SIGNATURE, MESSAGE)
    assert not key.verifies(SIGNATURE, MESSAGE + b"\0")
    for position in range(len(SIGNATURE)):
        changed = bytearray(SIGNATURE)
        changed[position] ^= 1
        assert not key.verifies(bytes(changed), MESSAGE)


def test_a_new_key_is_readable_by_its_owner_alone_and_replaces_no_file(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "release.pem"
    public = new_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert public_key_of(read_private_key(path)) == public
    assert read_public_key(f"{path}.pub") == read_public_key(public.base64) == public
    content = path.read_bytes()
    assert_refused(lambda: new_key(path), str(path), "exists")
    path.unlink()
    assert_refused(lambda: new_key(path), f"{path}.pub", "exists")
    assert not path.exists()
    assert content != new_key(tmp_path / "other.pem").raw


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the command openssl")
@pytest.mark.slow
def test_openssl_reads_the_keys_and_verifies_a_signature(tmp_path: Path) -> None:
    path = tmp_path / "release.pem"
    public = new_key(path)
    shown = subprocess.run(
        ["openssl", "pkey", "-in", path, "-pubout", "-outform", "DER"], capture_output=True, check=True
    )
    assert shown.stdout[-32:] == public.raw
    (tmp_path / "message").write_bytes(b"a manifest")
    (tmp_path / "signature").write_bytes(read_private_key(path).sign(b"a manifest"))
    verify = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", f"{path}.pub", "-rawin", "-in", tmp_path / "message"]
    verify += ["-sigfile", tmp_path / "signature"]
    assert subprocess.run(verify, capture_output=True, check=False).returncode == 0
    (tmp_path / "message").write_bytes(b"another manifest")
    assert subprocess.run(verify, capture_output=True, check=False).returncode != 0


def test_an_encrypted_key_needs_its_passphrase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "release.pem"
    monkeypatch.setenv(PASSPHRASE_VARIABLE, "correct horse")
    public = new_key(path)
    assert b"BEGIN ENCRYPTED PRIVATE KEY" in path.read_bytes()
    assert public_key_of(read_private_key(path)) == public
    monkeypatch.setenv(PASSPHRASE_VARIABLE, "wrong horse")
    with pytest.raises(InputError, match=PASSPHRASE_VARIABLE) as wrong:
        read_private_key(path)
    assert "wrong horse" not in str(wrong.value)
    monkeypatch.delenv(PASSPHRASE_VARIABLE)
    assert_refused(lambda: read_private_key(path), str(path), "encrypted", PASSPHRASE_VARIABLE)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_a_private_key_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = write_private_key(tmp_path / "release.pem", ed25519.Ed25519PrivateKey.from_private_bytes(SEED), mode)
    assert_refused(lambda: read_private_key(path), str(path), f"{mode:04o}", "chmod 600")


def test_a_key_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    key = rsa.generate_private_key(65537, 1024)
    path = write_private_key(tmp_path / "rsa.pem", key)
    assert_refused(lambda: read_private_key(path), str(path), "RSA", "Ed25519", "tailor keys new")
    public = tmp_path / "rsa.pub"
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    assert_refused(lambda: read_public_key(str(public)), str(public), "RSA", "Ed25519")


def test_a_file_that_is_no_key_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("secret notes")
    text.chmod(0o600)
    assert_refused(lambda: read_private_key(text), str(text), "not a private key")
    assert_refused(lambda: read_private_key(tmp_path / "absent"), "absent", "No such file")
    assert_refused(lambda: read_private_key(tmp_path), "not a file")
    assert_refused(lambda: read_public_key(str(text)), str(text), "not a public key")
    private = tmp_path / "release.pem"
    new_key(private)
    assert_refused(lambda: read_public_key(str(private)), str(private), "not a public key")


def test_the_signing_key_is_the_one_of_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert signing_key() is None
    public = new_key(tmp_path / "release.pem")
    monkeypatch.setenv(KEY_VARIABLE, "release.pem")
    assert public_key_of(signing_key()) == public


def test_trusted_keys_are_listed_in_the_params_or_in_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert trusted_keys() == ()
    first, second = new_key(tmp_path / "one.pem"), new_key(tmp_path / "two.pem")
    Path("params.yaml").write_text(f"serving:\n  trusted_keys: [one.pem.pub, {second.base64}]\n")
    assert trusted_keys() == (first, second)
    Path("params.yaml").write_text("serving:\n  trusted_keys: []\n")
    assert trusted_keys() == ()
    monkeypatch.setenv(TRUSTED_VARIABLE, f"{second.base64}:one.pem.pub")
    assert trusted_keys() == (second, first)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("serving:\n  trusted_keys: one.pem.pub\n", "expected a list"),
        ("serving:\n  trusted_keys: [1]\n", "expected a list"),
        ("serving:\n  trusted_keys: [absent.pub]\n", "absent.pub"),
        ("serving: [trusted_keys\n", "not YAML"),
        ("trusted_keys: [absent.pub]\n", "serving.trusted_keys, once"),
        ("serving:\n  trusted_keys: [absent.pub]\nserving:\n  top_k: 5\n", "stands twice"),
        ("serving:\n  trusted_keys: [absent.pub]\n  trusted_keys: []\n", "stands twice"),
        ("serving:\n  trusted_keys: null\n", "expected a list"),
    ],
)
def test_a_list_that_cannot_be_read_is_an_error_and_disables_nothing(text: str, part: str) -> None:
    Path("params.yaml").write_text(text)
    assert_refused(trusted_keys, part)


def test_an_empty_variable_does_not_disable_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRUSTED_VARIABLE, "")
    assert_refused(trusted_keys, TRUSTED_VARIABLE, "empty")


def test_a_list_in_utf_16_is_read(tmp_path: Path) -> None:
    key = new_key(tmp_path / "one.pem")
    Path("params.yaml").write_text("serving:\n  trusted_keys: [one.pem.pub]\n", encoding="utf-16")
    assert trusted_keys() == (key,)


def test_a_broken_link_as_params_disables_nothing() -> None:
    Path("params.yaml").symlink_to("absent.yaml")
    assert_refused(trusted_keys, "params.yaml", "No such file")


@pytest.mark.parametrize("full_at", [1, 2])
def test_a_full_disk_leaves_no_half_of_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_at: int) -> None:
    folder, calls = tmp_path / "keys", []

    def fsync(_descriptor: int) -> None:
        calls.append(None)
        if len(calls) == full_at:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        name = "release.pem" if full_at == 1 else "release.pem.pub"
        assert_refused(lambda: new_key(folder / "release.pem"), str(folder / name), "No space left")
    assert list(folder.iterdir()) == []
    new_key(folder / "release.pem")


def test_a_passphrase_may_be_any_bytes_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PASSPHRASE_VARIABLE, os.fsdecode(b"caf\xe9"))
    public = new_key(tmp_path / "release.pem")
    assert public_key_of(read_private_key(tmp_path / "release.pem")) == public
    monkeypatch.setenv(PASSPHRASE_VARIABLE, "x" * 1024)
    assert_refused(lambda: new_key(tmp_path / "long.pem"), PASSPHRASE_VARIABLE, "1023")
