# SPDX-License-Identifier: Apache-2.0
"""compute-sanitizer finds nothing in the extension's kernels. Needs a GPU and the CUDA toolkit; takes minutes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_kqsvd.ops.cuda_library import available

USABLE, WHY = available()
TOOL = shutil.which("compute-sanitizer")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not USABLE, reason=WHY),
    pytest.mark.skipif(TOOL is None, reason="needs compute-sanitizer"),
]
# initcheck has to see every write, so it watches all kernels; the others watch ours alone.
ONLY_OURS = ["--kernel-name", "kns=kqsvd"]


def findings(report: str) -> list[str]:
    """Lines of a report that name one of our kernels."""
    return [line for line in report.splitlines() if "kqsvd" in line and line.startswith("=========")]


@pytest.mark.parametrize("part", ["store", "dequantize", "decode", "rest"])
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_clean(tool, part):
    options = [] if tool == "initcheck" else ONLY_OURS
    command = [str(TOOL), "--tool", tool, *options, sys.executable, "-m", "tests.ops.sanitizer_cases", part]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # or tensors would share allocations
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=1200)
    report = done.stdout + done.stderr
    assert f"{part} done" in report, report[-3000:]
    assert findings(report) == [], report[:6000]
