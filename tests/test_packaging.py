# SPDX-License-Identifier: Apache-2.0
"""What a user installs: source distribution and wheel, their content and entry points, a light import."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import pytest

from tests.conftest import ROOT, python

SOURCES = {".py", ".cu", ".cuh", ".cpp", ".h", ".json", ".typed"}


@pytest.fixture
def wheel(wheel_file: Path) -> zipfile.ZipFile:
    """Its content."""
    return zipfile.ZipFile(wheel_file)


def read(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = (n for n in wheel.namelist() if n.endswith(f".dist-info/{name}"))
    return wheel.read(path).decode()


def test_source_distribution_is_complete(sdist: Path) -> None:
    found = {str(p.relative_to(sdist)) for p in sdist.rglob("*") if p.is_file()}
    for folder in ("vllm_kqsvd", "calibration", "csrc"):
        wanted = {str(p.relative_to(ROOT)) for p in (ROOT / folder).rglob("*") if p.suffix in SOURCES}
        assert wanted <= found, wanted - found
    assert {"LICENSE", "README.md", "CHANGELOG.md", "setup.py", "pyproject.toml"} <= found
    assert not [name for name in found if name.endswith((".so", ".safetensors", ".whl"))]


def test_wheel_is_pure_and_holds_the_package_alone(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"vllm_kqsvd"}
    files = {"__init__.py", "py.typed", "decode_speed.json", "calibration/__init__.py"}
    assert {f"vllm_kqsvd/{name}" for name in files} <= set(names)
    assert not [name for name in names if name.endswith(".so")]
    assert "Root-Is-Purelib: true" in read(wheel, "WHEEL")


def test_wheel_holds_every_module(wheel: zipfile.ZipFile) -> None:
    wanted = {str(p.relative_to(ROOT)) for p in (ROOT / "vllm_kqsvd").rglob("*.py")}
    wanted |= {f"vllm_kqsvd/{p.relative_to(ROOT)}" for p in (ROOT / "calibration").rglob("*.py")}
    assert wanted <= set(wheel.namelist())


def test_core_dependencies_never_pin_torch(wheel: zipfile.ZipFile) -> None:
    metadata = Parser().parsestr(read(wheel, "METADATA"))
    core = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(core) == ["numpy", "safetensors", "torch"]
    assert set(metadata.get_all("Provides-Extra")) == {"calibrate", "ray", "xformers", "bench", "dev"}


def test_supported_pythons_are_named(wheel: zipfile.ZipFile) -> None:
    metadata = Parser().parsestr(read(wheel, "METADATA"))
    named = [c.split(" :: ")[-1] for c in metadata.get_all("Classifier") if c.startswith("Programming Language ::")]
    assert {"3.11", "3.12", "3.13"} <= set(named) and "Typing :: Typed" in metadata.get_all("Classifier")
    assert metadata["Requires-Python"] == ">=3.11"


def test_entry_points(wheel: zipfile.ZipFile) -> None:
    points = ConfigParser()
    points.read_string(read(wheel, "entry_points.txt"))
    assert dict(points["vllm.stat_logger_plugins"]) == {"kqsvd": "vllm_kqsvd.metrics:KQSVDStatLogger"}
    assert dict(points["vllm.general_plugins"]) == {"kqsvd": "vllm_kqsvd.plugin:register"}
    assert dict(points["console_scripts"]) == {"kqsvd": "vllm_kqsvd.cli:main"}
    for target in ("vllm_kqsvd/plugin.py", "vllm_kqsvd/cli.py"):
        assert target in wheel.namelist()


def test_import_is_light() -> None:
    script = (
        "import sys, time; start = time.perf_counter(); import vllm_kqsvd, vllm_kqsvd.plan, vllm_kqsvd.layout;"
        "took = time.perf_counter() - start; heavy = {'vllm', 'triton', 'transformers', 'torch'} & set(sys.modules);"
        "assert not heavy, heavy; assert took < 1, took"
    )
    python("-c", script)


def test_plugin_import_is_light() -> None:
    # Every vLLM process loads the entry point before it reads its arguments.
    script = (
        "import sys, vllm_kqsvd.plugin; heavy = {'vllm', 'triton', 'transformers'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    python("-c", script)


def test_a_wrong_build_switch_is_named() -> None:
    found = subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=ROOT,
        env=os.environ | {"KQSVD_BUILD_CUDA": "yes"},
        text=True,
        capture_output=True,
    )
    assert found.returncode == 1
    assert "KQSVD_BUILD_CUDA='yes': expected 0, 1 or auto" in found.stderr
