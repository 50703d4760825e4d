"""Ed25519 keys (RFC 8032) that sign releases: make, read, and list the trusted ones.

A private key is a PEM file (PKCS8) of mode 0600, encrypted if TAILOR_SIGNING_PASSPHRASE is set. Its content is never
printed and never part of a command line. `cryptography` is imported inside the functions: an installation without
signatures does not need it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from serving.shared.atomic import sync
from serving.shared.errors import InputError, install_command

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

KEY_VARIABLE = "TAILOR_SIGNING_KEY"  # file of the private key
PASSPHRASE_VARIABLE = "TAILOR_SIGNING_PASSPHRASE"
TRUSTED_VARIABLE = "TAILOR_TRUSTED_KEYS"  # replaces serving.trusted_keys; entries are separated by colons
TRUSTED_KEY = "serving.trusted_keys"
PARAMS_FILE = Path("params.yaml")
RAW_BYTES = 32  # of a public key
ID_DIGITS = 16


@dataclass(frozen=True)
class PublicKey:
    """An Ed25519 public key. raw: its 32 bytes."""

    raw: bytes

    @property
    def id(self) -> str:
        """The first 16 hexadecimal digits of the sha256 of the raw key: its name in signature files and messages."""
        return hashlib.sha256(self.raw).hexdigest()[:ID_DIGITS]

    @property
    def base64(self) -> str:
        """The raw key in base64, one of the two forms that serving.trusted_keys accepts."""
        return base64.b64encode(self.raw).decode()

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Whether this key made the signature (64 bytes) of exactly this message."""
        library = _cryptography()
        try:
            library.ed25519.Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, message)
        except library.InvalidSignature:
            return False
        return True


def new_key(path: Path) -> PublicKey:
    """Write a new private key to `path` and its public key to `path`.pub; returns the public key.

    The private key is encrypted if TAILOR_SIGNING_PASSPHRASE is set. Raises InputError if one of the files exists or
    cannot be written.
    """
    library = _cryptography()
    key = library.ed25519.Ed25519PrivateKey.generate()
    passphrase = os.environ.get(PASSPHRASE_VARIABLE)
    serialization = library.serialization
    encryption = (
        serialization.BestAvailableEncryption(os.fsencode(passphrase)) if passphrase else serialization.NoEncryption()
    )
    try:
        private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    except ValueError:
        raise InputError(f"{PASSPHRASE_VARIABLE} cannot encrypt a key; expected at most 1023 bytes") from None
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    public_path = path.with_name(f"{path.name}.pub")
    for target in (path, public_path):
        if os.path.lexists(target):
            raise InputError(f"{target}: exists and is not replaced; give another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _create(path, private, 0o600)
        try:
            _create(public_path, public, 0o644)
        except BaseException:
            path.unlink(missing_ok=True)  # a private key without its public key is of no use
            raise
        sync(path.parent)
    except OSError as error:
        raise InputError(
            f"{error.filename}: {error.strerror}; give a new file in a folder that you can write"
        ) from None
    return public_key_of(key)


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """Read a private key. Raises InputError naming the file: its mode, its kind of key, a missing or wrong passphrase."""
    library = _cryptography()
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path}: is not a file; expected the private key that `tailor keys new` wrote")
        with path.open("rb") as stream:
            mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
            data = stream.read()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected the private key of {KEY_VARIABLE}") from None
    if mode & 0o077:
        raise InputError(f"{path}: has mode {mode:04o}, other users may read it; expected 0600: chmod 600 {path}")
    encrypted = b"ENCRYPTED" in data
    passphrase = os.environ.get(PASSPHRASE_VARIABLE)
    if encrypted and not passphrase:
        raise InputError(f"{path}: is encrypted, and {PASSPHRASE_VARIABLE} is not set; set it to the key's passphrase")
    try:
        key = library.serialization.load_pem_private_key(data, os.fsencode(passphrase) if encrypted else None)
    except (ValueError, TypeError, library.UnsupportedAlgorithm):
        reason = f"is damaged, or {PASSPHRASE_VARIABLE} is not its passphrase" if encrypted else "is not a private key"
        raise InputError(f"{path}: {reason}; expected an Ed25519 key in PEM (PKCS8)") from None
    if not isinstance(key, library.ed25519.Ed25519PrivateKey):
        raise InputError(f"{path}: holds {_kind(key)}; expected Ed25519: make a key with `tailor keys new FILE`")
    return key


def signing_key() -> Ed25519PrivateKey | None:
    """The private key in the file that TAILOR_SIGNING_KEY names; None if the variable is not set. Raises InputError."""
    name = os.environ.get(KEY_VARIABLE)
    return read_private_key(Path(name).expanduser()) if name else None


def public_key_of(key: Ed25519PrivateKey) -> PublicKey:
    """The public key of a private key."""
    return PublicKey(key.public_key().public_bytes_raw())


def read_public_key(entry: str) -> PublicKey:
    """A public key, from the path of a PEM file or from 44 characters of base64. Raises InputError naming the entry."""
    hint = "expected the .pub file that `tailor keys new` wrote, or the base64 that `tailor keys show` prints"
    try:
        raw = base64.b64decode(entry, validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if len(raw) == RAW_BYTES and base64.b64encode(raw).decode() == entry:
        return PublicKey(raw)
    library = _cryptography()
    try:
        key = library.serialization.load_pem_public_key(Path(entry).expanduser().read_bytes())
    except OSError as error:
        raise InputError(f"{entry}: {error.strerror}; {hint}") from None
    except (ValueError, library.UnsupportedAlgorithm):
        raise InputError(f"{entry}: is not a public key in PEM; {hint}") from None
    if not isinstance(key, library.ed25519.Ed25519PublicKey):
        raise InputError(f"{entry}: holds {_kind(key)}; expected Ed25519, {hint}")
    return PublicKey(key.public_bytes_raw())


def trusted_keys() -> tuple[PublicKey, ...]:
    """The keys whose releases may be promoted and served; empty: signatures are not checked.

    The list is TAILOR_TRUSTED_KEYS if that is set, else serving.trusted_keys of params.yaml in the working directory.
    Paths are relative to it. Raises InputError for a list or a key that cannot be read, so that a mistake does not
    disable the check.
    """
    text = os.environ.get(TRUSTED_VARIABLE)
    if text is None:
        return tuple(map(read_public_key, _entries_of_params()))
    entries = [entry for entry in text.split(os.pathsep) if entry]
    if not entries:
        raise InputError(f"{TRUSTED_VARIABLE} is empty; expected public keys separated by {os.pathsep!r}, or unset it")
    return tuple(map(read_public_key, entries))


def trusted_source() -> str:
    """What trusted_keys reads, for messages: the variable if it is set, else the key of params.yaml."""
    return TRUSTED_VARIABLE if TRUSTED_VARIABLE in os.environ else TRUSTED_KEY


def _entries_of_params() -> list[str]:
    name = TRUSTED_KEY
    try:
        data = PARAMS_FILE.read_bytes()
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not PARAMS_FILE.is_symlink():
            return []
        raise InputError(f"{PARAMS_FILE}: {error.strerror}; {name} is read from it") from None
    if b"trusted_keys" not in data and b"\0" not in data:  # YAML may also be UTF-16
        return []
    try:
        import yaml
    except ModuleNotFoundError:
        raise InputError(f"{PARAMS_FILE}: {name} needs PyYAML; pip install pyyaml, or set {TRUSTED_VARIABLE}") from None
    try:
        content = yaml.safe_load(data)
        scalars = [event.value for event in yaml.parse(data, yaml.SafeLoader) if isinstance(event, yaml.ScalarEvent)]
    except (yaml.YAMLError, ValueError):
        raise InputError(f"{PARAMS_FILE}: is not YAML, so {name} cannot be read; correct it") from None
    section = content.get("serving") if isinstance(content, dict) else None
    listed = isinstance(section, dict) and "trusted_keys" in section
    if scalars.count("trusted_keys") != listed:  # else a second section `serving` would disable the check
        raise InputError(f"{PARAMS_FILE}: trusted_keys stands twice or outside of serving; expected {name}, once")
    entries = section["trusted_keys"] if listed else []
    if not isinstance(entries, list) or not all(isinstance(entry, str) and entry for entry in entries):
        raise InputError(f"{PARAMS_FILE}: {name} is {entries!r}; expected a list of public key files or base64 keys")
    return entries


def _create(path: Path, data: bytes, mode: int) -> None:
    """Write a file that must not exist yet, with this mode from the start; removes it if the write fails."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(descriptor)
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # the OSError of a write (full disk) has no file name
        raise


def _kind(key: object) -> str:
    name = type(key).__name__.strip("_")
    return f"a key of type {name.removesuffix('PrivateKey').removesuffix('PublicKey')}"


def _cryptography() -> SimpleNamespace:
    """The modules and errors of `cryptography` that this module uses. Raises InputError if it is not installed."""
    try:
        from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ModuleNotFoundError:
        raise InputError(f"signed releases need the package cryptography; {install_command('serve')}") from None
    return SimpleNamespace(
        ed25519=ed25519,
        serialization=serialization,
        InvalidSignature=InvalidSignature,
        UnsupportedAlgorithm=UnsupportedAlgorithm,
    )
