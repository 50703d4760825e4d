"""`tailor keys`: keys that sign releases; sign and verify an export or a repository."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from serving.commands.options import Debug
from serving.repository import signed_release, signing_keys
from serving.repository.lock import locked
from serving.repository.manifest import load_manifest
from serving.repository.release import published_versions, read_release
from serving.repository.signature import verify_manifest
from serving.repository.signing_keys import KEY_VARIABLE, PASSPHRASE_VARIABLE, TRUSTED_VARIABLE
from serving.repository.version_policy import CONFIG_NAME, listed_versions
from serving.shared.errors import InputError, ServingError
from serving.shared.names import STUDENT
from serving.shared.terminal import print

NEW = f"""\b
Examples:
  tailor keys new ~/.tailor/release.pem              also writes ~/.tailor/release.pem.pub
  read -rs {PASSPHRASE_VARIABLE}; export {PASSPHRASE_VARIABLE}
  tailor keys new ~/.tailor/release.pem              encrypted with that passphrase

Keep the private key off the machines that serve; they need the public key alone."""
SHOW = "Example: tailor keys show ~/.tailor/release.pem.pub"
SIGN = f"""\b
Examples:
  tailor keys sign artifacts/export                  then: tailor promote artifacts/export
  tailor keys sign releases                          every version there, also with a new key

The key is the file that {KEY_VARIABLE} names. Stage `export` signs by itself where the variable is set."""
VERIFY = f"""\b
Examples:
  tailor keys verify artifacts/export
  {TRUSTED_VARIABLE}=release.pem.pub tailor keys verify releases

Exit status 1: the export, or a version that a server of the repository loads, is refused."""

app = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Sign releases, and verify their signatures.",
    epilog="Example: tailor keys new release.pem, then list release.pem.pub in serving.trusted_keys of params.yaml",
)
Folder = Annotated[Path, typer.Argument(help="An export folder or a model repository.", show_default=False)]


@app.command(epilog=NEW)
def new(
    file: Annotated[Path, typer.Argument(help="File of the private key; must not exist yet.", show_default=False)],
    debug: Debug = False,
) -> None:
    """Make an Ed25519 key: FILE, readable by you alone, and FILE.pub."""
    _print_key(signing_keys.new_key(file))
    if not os.environ.get(PASSPHRASE_VARIABLE):
        print(f"{file} is not encrypted; to encrypt a key, set {PASSPHRASE_VARIABLE} before it is made")


@app.command(epilog=SHOW)
def show(
    file: Annotated[str, typer.Argument(help="A public key: its file or its base64.", show_default=False)],
    debug: Debug = False,
) -> None:
    """Print the id and the base64 of a public key."""
    _print_key(signing_keys.read_public_key(file))


@app.command(epilog=SIGN)
def sign(folder: Folder, debug: Debug = False) -> None:
    """Sign an export, or all versions of a repository.

    The files are first compared with the manifest. An earlier signature is replaced.
    """
    key = signing_keys.signing_key()
    if key is None:
        raise InputError(f"{KEY_VARIABLE} is not set; expected the file of a private key that `tailor keys new` wrote")
    name = signing_keys.public_key_of(key).id
    if not _is_repository(folder):
        signed_release.sign_export(folder, key)
        print(f"{folder}: signed by key {name}")
        return
    with locked(folder):
        for version in published_versions(folder):
            signed_release.sign_version(folder, version, key)
            print(f"version {version}: signed by key {name}")


@app.command(epilog=VERIFY)
def verify(folder: Folder, debug: Debug = False) -> int:
    """Verify an export, or all versions of a repository.

    Use it where the server starts without Tailor, as in a container: before the start.
    """
    trusted = signing_keys.trusted_keys()
    if not trusted:
        raise InputError(f"no key is trusted; expected serving.trusted_keys in params.yaml, or {TRUSTED_VARIABLE}")
    if not _is_repository(folder):
        key = verify_manifest(folder, trusted)
        load_manifest(folder)
        print(f"{folder}: signed by key {key.id}")
        return 0
    refused, listed = set(), listed_versions(folder)
    for version in sorted({*published_versions(folder), *listed}):
        try:
            read_release(folder, version)
            print(f"version {version}: signed by a trusted key")
        except ServingError as error:
            refused.add(version)
            print(f"version {version}: refused: {error}")
    return 1 if refused & listed else 0


def _is_repository(folder: Path) -> bool:
    return (folder / STUDENT / CONFIG_NAME).is_file()


def _print_key(key: signing_keys.PublicKey) -> None:
    print(f"key {key.id}")
    print(f"public {key.base64}")
