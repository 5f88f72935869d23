# SPDX-License-Identifier: Apache-2.0
"""House rules that a tool can check: ruff, formatting, import contracts, licence headers, file length."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path
    for folder in ("vllm_kqsvd", "calibration", "csrc", "tests", "benchmarks", "requirements")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".cu", ".cuh", ".cpp", ".h"}
)


def tool(*command: str, cwd: Path = ROOT) -> None:
    """Run a linter; its output is the failure message."""
    found = subprocess.run(command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if found.returncode:
        pytest.fail(found.stdout, pytrace=False)


@pytest.mark.parametrize("arguments", [("check",), ("format", "--check")], ids=["check", "format"])
def test_ruff(arguments: tuple[str, ...]) -> None:
    tool(sys.executable, "-m", "ruff", *arguments, ".")


def test_import_contracts(tmp_path: Path) -> None:
    # An editable install keeps calibration/ out of the package's folder; the linter walks folders.
    for folder, target in (("vllm_kqsvd", "vllm_kqsvd"), ("calibration", "vllm_kqsvd/calibration")):
        shutil.copytree(ROOT / folder, tmp_path / target, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    script = "from importlinter.cli import lint_imports_command as run; run()"
    tool(sys.executable, "-c", script, "--no-cache", "--config", str(ROOT / "pyproject.toml"), cwd=tmp_path)


def test_every_source_has_its_licence_header() -> None:
    header = "SPDX-License-Identifier: Apache-2.0"
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in SOURCES}
    bare = [name for name, text in texts.items() if text.strip() and header not in text[:400]]
    assert not bare


def test_no_file_outgrows_one_idea() -> None:
    long = [str(p.relative_to(ROOT)) for p in SOURCES if len(p.read_text().splitlines()) > 400]
    assert not long


def test_types() -> None:
    pytest.importorskip("mypy")
    tool(sys.executable, "-m", "mypy")
