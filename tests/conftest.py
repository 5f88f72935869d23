# SPDX-License-Identifier: Apache-2.0
"""Source distribution and wheel, made once for the tests of what a user installs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE",
         "vllm_kqsvd", "calibration", "csrc", "tests")  # fmt: skip


def python(*arguments: str, cwd: Path = ROOT, **environment: str) -> str:
    """Standard output of this interpreter."""
    found = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=os.environ | environment, text=True, capture_output=True
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution, made from a copy that holds nothing but the sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("sdist")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(ROOT / part, source / part)
    script = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    python("-c", script, str(out), cwd=source, KQSVD_BUILD_CUDA="0")
    (archive,) = out.iterdir()
    with tarfile.open(archive) as tar:
        tar.extractall(out, filter="data")
    return out / archive.name.removesuffix(".tar.gz")


def build_wheel(sdist: Path, out: Path, **environment: str) -> Path:
    """A wheel built from the source distribution with what is installed, without an index."""
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(out))
    with tempfile.TemporaryDirectory() as scratch:  # a build leaves its `build/lib` where the sources are
        source = shutil.copytree(sdist, Path(scratch, "source"))
        python("-m", "pip", "wheel", *options, str(source), **environment)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="session")
def wheel_file(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pure wheel."""
    return build_wheel(sdist, tmp_path_factory.mktemp("wheel"), KQSVD_BUILD_CUDA="0")
