"""Write the Python packages of each image, with licences and sha256, as CycloneDX 1.6 into build/sbom/IMAGE.cdx.json.

`make sbom` runs it. Read are the locks that the Dockerfile installs, for Python 3.12 on Linux x86-64. What the base images
bring (Triton, CUDA, Debian) is not in them.
"""

from __future__ import annotations

import re
from pathlib import Path

from audit import ROOT, allowed, installed, stated
from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import ExternalReference, ExternalReferenceType, HashAlgorithm, HashType, XsUri
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from packaging.requirements import Requirement

from serving.shared.version import TAILOR_VERSION

LOCKS = {"train": "train", "serve": "container", "gateway": "gateway"}
PYTHON = {
    "python_version": "3.12",
    "python_full_version": "3.12.3",
    "sys_platform": "linux",
    "platform_machine": "x86_64",
}


def components(lock: Path, licences: dict[str, str]) -> list[Component]:
    """The packages that a lock installs in an image. licences: those of the packages that state one."""
    found = []
    for entry in re.findall(r"^[^#\s].*?[^\\]$", lock.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        text, *hashes = re.split(r"[\s\\]*--hash=sha256:", entry)
        package = Requirement(text)
        if package.marker and not package.marker.evaluate(PYTHON):
            continue
        version = str(package.specifier).removeprefix("==")
        source = ExternalReference(
            type=ExternalReferenceType.DISTRIBUTION,
            url=XsUri(f"https://pypi.org/project/{package.name}/{version}/"),
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=content) for content in hashes],
        )
        address = PackageURL("pypi", name=package.name, version=version)
        found.append(
            Component(
                name=package.name,
                version=version,
                bom_ref=str(address),
                purl=address,
                external_references=[source],
                licenses=[LicenseFactory().make_from_string(licences[package.name])]
                if package.name in licences
                else [],
            )
        )
    return found


def main() -> None:
    folder = ROOT / "build/sbom"
    folder.mkdir(parents=True, exist_ok=True)
    texts = {name: stated(package) for name, package in installed().items()}
    licences = {name: max(found, key=allowed) for name, found in texts.items() if found}
    for image, lock in LOCKS.items():
        parts = components(ROOT / f"requirements/{lock}.txt", licences)
        bom = Bom(components=parts)
        bom.metadata.component = Component(name=f"tailor-{image}", version=TAILOR_VERSION, type=ComponentType.CONTAINER)
        bom.register_dependency(bom.metadata.component, parts)
        path = folder / f"{image}.cdx.json"
        path.write_text(JsonV1Dot6(bom).output_as_string(indent=2) + "\n", encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {len(parts)} packages")


if __name__ == "__main__":
    main()
