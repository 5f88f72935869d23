# SPDX-License-Identifier: Apache-2.0
"""Instruction budget of the decode kernel's main loop, from its disassembly. No GPU needed.

`python -m tests.ops.decode_sass [plan ...]` compiles csrc/decode_*.cu for sm_90a, finds the loop around the absorb
products (HGMMA) and prints thread instructions per latent element; it fails above the budget.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from vllm_kqsvd.plan_catalog import PLANS, Instance

BUDGET = 2.0  # instructions per latent element, absorb step and rarely taken branches inside the loop included
_LINE = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);")


def cuobjdump() -> str | None:
    """The disassembler: on PATH, else the one inside Triton's wheel."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = find_spec("triton")
    inside = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec and spec.origin else None
    return str(inside) if inside and inside.exists() else None


def main_loop(sass: str) -> list[str]:
    """Instructions of the smallest loop that holds every HGMMA, in order."""
    lines = [(int(m[1], 16), m[2]) for m in _LINE.finditer(sass)]
    products = [i for i, (_, text) in enumerate(lines) if "HGMMA" in text]
    best: tuple[int, int] | None = None
    index = {address: i for i, (address, _) in enumerate(lines)}
    for i in range(products[-1] + 1, len(lines)):
        if m := re.search(r"\bBRA\b.*?0x([0-9a-f]+)", lines[i][1]):
            start = index.get(int(m[1], 16))
            if start is not None and start < products[0] and (best is None or i - start < best[1] - best[0]):
                best = (start, i)
    if best is None:
        raise ValueError("no loop around the HGMMA instructions")
    return [text for _, text in lines[best[0] : best[1] + 1]]


def instructions_per_element(instance: Instance) -> float:
    """Thread instructions of the loop over the latent elements (K and V) that a warp reads in it."""
    source = Path(__file__).parents[2] / "csrc" / f"{instance.name}.cu"
    tool = cuobjdump()
    assert tool is not None
    with tempfile.TemporaryDirectory() as folder:
        cubin = f"{folder}/kernel.cubin"
        flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-gencode=arch=compute_90a,code=sm_90a", "--cubin"]
        subprocess.run(["nvcc", *flags, str(source), "-o", cubin], check=True)
        sass = subprocess.run([tool, "-sass", cubin], check=True, capture_output=True, text=True).stdout
    entry = next(part for part in sass.split("Function : ") if "decode_kernel" in part[:200])
    _, plan = PLANS[instance.plan_name]
    tokens = 16 // instance.columns * instance.rope_block  # of one warp in one turn of the loop
    return len(main_loop(entry)) * 32 / (tokens * (plan.k.rank + plan.v.rank))


def main(names: list[str]) -> int:
    """Print every figure; 1 if one is over the budget."""
    worst = 0.0
    for name in names or ["d128_b82"]:
        value = instructions_per_element(Instance(name, 4, 32))
        print(f"{name}: {value:.2f} instructions per latent element, budget {BUDGET}")
        worst = max(worst, value)
    return int(worst > BUDGET)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
