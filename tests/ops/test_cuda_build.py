# SPDX-License-Identifier: Apache-2.0
"""csrc compiles without a GPU, spills no register, and registers its operators. Needs nvcc; takes a minute or two."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")]


def compile_one(source: str, out: Path) -> str:
    """Compile a translation unit as setup.py does; the assembler's resource report."""
    torch_include = Path(torch.__file__).parent / "include"
    flags = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Xptxas=-v", "-DUSE_CUDA", f"-I{ROOT / 'csrc'}"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{torch_include}"]
    flags += [f"-I{torch_include / 'torch/csrc/api/include'}", "-gencode=arch=compute_90a,code=sm_90a"]
    command = ["nvcc", *flags, "-c", str(ROOT / "csrc" / source), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("source", ["bindings.cpp", "step.cu", "store_latent.cu", "dequantize.cu"])
def test_compiles_within_its_registers(source, tmp_path):
    report = compile_one(source, tmp_path / "out.o")
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill", report)]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    if source == "store_latent.cu":  # its kernel for prefill chunks fills a multiprocessor alone, and spills a little
        assert max(registers) <= 255 and max(spilled) < 512
    else:  # blocks of 256 threads, two on a multiprocessor
        assert max(registers, default=0) <= 128 and sum(spilled) == 0
    assert (source == "bindings.cpp") == (not registers)
