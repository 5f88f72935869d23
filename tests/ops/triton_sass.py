# SPDX-License-Identifier: Apache-2.0
"""Instructions of the Triton decode kernel, from its disassembly. No GPU needed.

`python -m tests.ops.triton_sass [plan ...]` compiles the decode step of 32 query and 8 KV heads for sm_80 and sm_90 and
prints what the main loop of `split_kernel` is made of. Figures depend on the release of Triton.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch

from tests.helpers import random_codec
from tests.ops.decode_sass import disassemble, loops
from tests.ops.test_cpu import ragged_step
from tests.ops.test_triton_compile import Recorder, compile_launch
from vllm_kqsvd.ops import LayerShape
from vllm_kqsvd.ops.triton import decode, merge
from vllm_kqsvd.ops.triton.layer_ops import TritonOps
from vllm_kqsvd.plan_catalog import PLANS


def decode_launches(plan_name: str, group: int = 4, rope_block: int = 32, q_len: int = 1) -> list:
    """(kernel, arguments, keywords) of the launches of one decode step with 8 KV heads and blocks of 128 tokens."""
    dim, plan = PLANS[plan_name]
    codec = random_codec(plan, 8, dim, rope_block)
    ops = TritonOps(codec, LayerShape(8 * group, 8, dim, 128, 32, dim**-0.5, torch.bfloat16, 64))
    found: list = []
    step = ragged_step([200], [q_len], 128, 32, torch.Generator().manual_seed(0))
    step = replace(step, num_decodes=1, num_decode_tokens=q_len, max_decode_len=q_len)
    pages = torch.zeros(32, codec.layout.page_bytes(8, 128), dtype=torch.uint8)
    window = torch.zeros(32, 8, 32, 2 * dim, dtype=torch.bfloat16)
    query = torch.zeros(q_len, 8 * group, dim, dtype=torch.bfloat16)
    key = torch.zeros(q_len, 8, dim, dtype=torch.bfloat16)
    with (
        patch.object(decode, "split_kernel", Recorder(decode.split_kernel, found)),
        patch.object(merge, "merge_kernel", Recorder(merge.merge_kernel, found)),
    ):
        ops.attend(query, key, key, pages, window, step, torch.empty_like(query))
    return found


def sass(compiled) -> str:
    """Disassembly of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        return disassemble(f.name)


def opcode(line: str) -> str:
    """Name of an instruction without its modifiers and predicate."""
    return line.split()[line.startswith("@")].split(".")[0]


@dataclass(frozen=True)
class Figures:
    """The main loop of `split_kernel`: its instructions, how many of them spill or wait for other warps, and how many
    thread instructions they are per latent element (K and V) that a warp reads in one turn."""

    instructions: int
    spills: int
    barriers: int
    per_element: float
    counts: Counter[str]


def figures(plan_name: str, arch: int, **shape: int) -> Figures:
    """Compile and count. `arch`: 80 or 90; `shape`: see `decode_launches`."""
    kernel, args, kwargs = decode_launches(plan_name, **shape)[0]
    body = max(loops(sass(compile_launch(kernel, args, kwargs, arch))), key=len)
    counts = Counter(map(opcode, body))
    plan = PLANS[plan_name][1]
    elements = kwargs["SUPER"] * (plan.k.rank + plan.v.rank)
    return Figures(len(body), counts["LDL"] + counts["STL"], counts["BAR"], len(body) * 32 / elements, counts)


def main(names: list[str]) -> None:
    """Print the figures of plans for both architectures."""
    for name in names or ["d128_b82"]:
        for arch in (80, 90):
            f = figures(name, arch)
            print(f"{name} sm_{arch}: {f.instructions} instructions, {f.per_element:.2f} per latent element,", end=" ")
            print(f"{f.spills} spills, {f.barriers} barriers: {dict(f.counts.most_common(16))}")


if __name__ == "__main__":
    main(sys.argv[1:])
