# SPDX-License-Identifier: Apache-2.0
"""Bit plans for which decode kernels are compiled, and the source of each instantiation. Pure Python.

A decode kernel knows its plan at compile time, so only plans listed here run in CUDA; others are served by
Triton. Planes are spelled out because the order of groups inside a secondary plane matters for speed: the fewer
different powers of two separate a group's planes, the fewer multiplications (`csrc/kqsvd/plan.cuh`).

Every width has several plans; `kqsvd calibrate` gives each layer the one it loses least with. The lettered ones follow
the spectra of two models (SmolLM2-135M, Qwen2.5-Coder-1.5B): steep, so that the first group takes 6 to 8 bits and the
last few none. At 64 x 8k on an H100 (one run, before the two-kernel decode) they took as long as their plain ones
within 2.5 %: d128_b82 160 us, a 164, b 161; d128_b130 220, a 225, b 224. Instructions of their main loops per latent
element (`python -m tests.ops.decode_sass`, nvcc 13.0, 4 columns, rope blocks of 32): d128_b130 1.55, a 2.03, b 2.07;
d128_b98 1.93, a 1.78; d128_b82 1.67, a 1.82, b 1.96, c 2.25; d128_b66 1.63, a 1.86; d64_b50 2.33, d64_b42b 2.27 (b98,
b66, d64 and the letters b: before the last change). At 64 x 8k d128_b82 takes 141.5 us, a 152.0, b 139.2, c 139.3
(H100, 2026-11-24). c has 2 bits for keys and 3 for values, as the second model's shaped tables want. Fewer
bits leave fewer elements to share what a token costs anyway: d64_b34 2.43, b 2.71, d64_b26 3.04, a 3.42, per token 272,
304, 243, 274. The budget is 2.0, or the kernel's own figure (`tests/ops/decode_sass.py`); the tests hold d128_b82 and
d64_b66 with 8 columns and blocks of 64, which they compile anyway. Plans of 26 bytes are for layers that can spare
bytes for others (`calibration/layer_budgets.py`).

`python -m vllm_kqsvd.plan_catalog csrc` writes csrc/decode_*.cu.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from vllm_kqsvd.plan import LayerPlan, Plane, SidePlan

COLUMNS = (4, 8)  # query columns a kernel holds at once
ROPE_BLOCKS = (32, 64)  # rope block lengths compiled; 0 (no frame) runs on the 32 kernel


def side(*planes: tuple[int, str]) -> SidePlan:
    """Planes as (bits, digits of the groups): side((4, "01"), (2, "2345"))."""
    return SidePlan(tuple(Plane(bits, tuple(int(g) for g in groups)) for bits, groups in planes))


_FOUR = side((4, "01"), (4, "23"), (4, "45"), (4, "67"))
_TWO = side((2, "0123"), (2, "4567"))
_K_48 = side((4, "01"), (4, "2"), (2, "0345"), (2, "67"))  # 6 4 4 2 2 2 2 2
_K_40 = side((4, "01"), (2, "2345"), (2, "67"))  # 4 4 2 2 2 2 2 2
_K_32 = side((4, "01"), (2, "2345"))  # 4 4 2 2 2 2, rank 96
_V_48 = side((4, "0"), (2, "1234"), (2, "56"), (1, "01526374"))  # 5 3 3 3 3 3 3 1
_V_40 = side((2, "0123"), (2, "4567"), (1, "0123"))  # 3 3 3 3 2 2 2 2

_K_64A = side((8, "0"), (4, "21"), (4, "3"), (2, "6145"), (1, "2457"))  # 8 6 5 4 3 3 2 1
_K_64B = side((4, "10"), (4, "23"), (4, "4"), (2, "7056"), (1, "0561"))  # 7 5 4 4 4 3 3 2
_V_64 = side((4, "10"), (4, "23"), (4, "4"), (2, "5067"), (1, "1567"))  # 6 5 4 4 4 3 3 3
_K_48A = side((4, "10"), (4, "2"), (2, "4053"), (2, "76"))  # 6 4 4 2 2 2 2 2
_V_48A = side((4, "01"), (2, "5234"), (2, "67"), (1, "0234"))  # 5 4 3 3 3 2 2 2
_K_40A = side((4, "10"), (2, "3042"), (1, "6527"))  # 6 4 3 2 2 1 1 1
_V_40A = side((4, "01"), (2, "3245"), (1, "0267"))  # 5 4 3 2 2 2 1 1
_K_40B = side((4, "10"), (4, "2"), (2, "03"), (1, "0145"))  # 7 5 4 2 1 1, rank 96
_V_56B = side((4, "01"), (4, "23"), (2, "7456"), (1, "0456"))  # 5 4 4 4 3 3 3 2
_K_32C = side((4, "10"), (2, "02"), (1, "3412"))  # 6 5 3 1 1, rank 80; beside values of 48 bytes
_V_40B = side((4, "0"), (2, "1234"), (2, "56"), (1, "1237"))  # 4 3 3 3 2 2 2 1
_K_32A = side((4, "10"), (2, "2034"))  # 6 4 2 2 2, rank 80
_K_32B = side((4, "10"), (4, "2"), (2, "03"))  # 6 4 4 2, rank 64
_V_32A = side((4, "0"), (2, "1234"), (1, "1567"))  # 4 3 2 2 2 1 1 1

# head_dim 64: four groups
_FOUR_64 = side((4, "01"), (4, "23"))
_THREE_64 = side((2, "0123"), (1, "0123"))
_TWO_64 = side((2, "0123"))
_K_24 = side((4, "01"), (2, "23"))  # 4 4 2 2
_K_16 = side((4, "0"), (2, "12"))  # 4 2 2, rank 48

_K_32A_64 = side((8, "0"), (4, "1"), (2, "23"))  # 8 4 2 2
_K_32B_64 = side((4, "10"), (4, "2"), (2, "03"))  # 6 4 4 2
_V_32_64 = side((4, "01"), (2, "32"), (1, "0312"))  # 5 5 3 3
_K_24A = side((4, "10"), (2, "02"))  # 6 4 2, rank 48
_K_24B = side((4, "0"), (2, "12"), (1, "1023"))  # 5 3 3 1
_K_16A = side((4, "0"), (2, "01"))  # 6 2, rank 32
_V_24_64 = side((4, "01"), (2, "23"))  # 4 4 2 2
_V_16_64 = side((2, "01"), (1, "0213"))  # 3 3 1 1
_K_8 = side((4, "0"))  # rank 16
_V_8 = side((2, "01"))  # 2 2, rank 32

PLANS: dict[str, tuple[int, LayerPlan]] = {
    # name: (head_dim, plan); the number is bytes per token and KV head, scales included
    "d128_b130": (128, LayerPlan(_FOUR, _FOUR)),
    "d128_b98": (128, LayerPlan(_K_48, _V_48)),
    "d128_b82": (128, LayerPlan(_K_40, _V_40)),
    "d128_b74": (128, LayerPlan(_K_40, _TWO)),
    "d128_b66": (128, LayerPlan(_K_32, _TWO)),
    "d64_b66": (64, LayerPlan(_FOUR_64, _FOUR_64)),
    "d64_b50": (64, LayerPlan(_K_24, _THREE_64)),
    "d64_b42": (64, LayerPlan(_K_24, _TWO_64)),
    "d64_b34": (64, LayerPlan(_K_16, _TWO_64)),
    "d128_b130a": (128, LayerPlan(_K_64A, _V_64)),
    "d128_b130b": (128, LayerPlan(_K_64B, _V_64)),
    "d128_b98a": (128, LayerPlan(_K_48A, _V_48A)),
    "d128_b98b": (128, LayerPlan(_K_40B, _V_56B)),
    "d128_b82a": (128, LayerPlan(_K_40A, _V_40A)),
    "d128_b82b": (128, LayerPlan(_K_40B, _V_40B)),
    "d128_b82c": (128, LayerPlan(_K_32C, _V_48A)),
    "d128_b66a": (128, LayerPlan(_K_32A, _V_32A)),
    "d128_b66b": (128, LayerPlan(_K_32B, _V_32A)),
    "d64_b66a": (64, LayerPlan(_K_32A_64, _V_32_64)),
    "d64_b66b": (64, LayerPlan(_K_32B_64, _V_32_64)),
    "d64_b50a": (64, LayerPlan(_K_24A, _V_24_64)),
    "d64_b50b": (64, LayerPlan(_K_24B, _V_24_64)),
    "d64_b42a": (64, LayerPlan(_K_16A, _V_24_64)),
    "d64_b42b": (64, LayerPlan(_K_16, _V_24_64)),
    "d64_b34a": (64, LayerPlan(_K_16A, _V_16_64)),
    "d64_b34b": (64, LayerPlan(_K_16, _V_16_64)),
    "d64_b26": (64, LayerPlan(_K_16, _V_8)),
    "d64_b26a": (64, LayerPlan(_K_8, _V_16_64)),
}


@dataclass(frozen=True)
class Instance:
    """One compiled decode kernel."""

    plan_name: str
    columns: int
    rope_block: int

    @property
    def name(self) -> str:
        """File stem and registration name."""
        return f"decode_{self.plan_name}_c{self.columns}_t{self.rope_block}"

    @property
    def key(self) -> int:
        """FNV-1a of the name as a signed 64-bit integer, as `decode_launch.h` computes it."""
        h = 0xCBF29CE484222325
        for c in self.name.encode():
            h = ((h ^ c) * 0x100000001B3) % 2**64
        return h - 2**64 if h >= 2**63 else h

    def source(self) -> str:
        """The generated translation unit."""
        head_dim, plan = PLANS[self.plan_name]
        return (
            "// SPDX-License-Identifier: Apache-2.0\n"
            "// Generated by vllm_kqsvd/plan_catalog.py; do not edit.\n"
            '#include "kqsvd/decode_instance.cuh"\n\n'
            "namespace kqsvd::decode {\n"
            f"struct Plan_{self.plan_name} {{\n"
            f"  static constexpr SidePlan keys = {_cpp(plan.k)};\n"
            f"  static constexpr SidePlan values = {_cpp(plan.v)};\n}};\n"
            f"static const Registration<Config<Plan_{self.plan_name}, {head_dim}, {self.columns}, {self.rope_block}>> "
            f'registration(\n    "{self.name}");\n'
            "}  // namespace kqsvd::decode\n"
        )


def _cpp(plan: SidePlan) -> str:
    planes = ", ".join(
        f"{{{p.num_bits}, {str(p.is_half).lower()}, {len(p.groups)}, {{{', '.join(map(str, p.groups))}}}}}"
        for p in plan.planes
    )
    return f"{{{len(plan.planes)}, {plan.num_groups}, {{{planes}}}}}"


def _variants(name: str) -> list[tuple[int, int]]:
    """(columns, rope block) of a plan's kernels. The lettered plans have those that default calibrations need: blocks
    of 64 only at head_dim 128 and for more than 4 query heads per KV head."""
    if not name[-1].isalpha():
        return [(c, t) for c in COLUMNS for t in ROPE_BLOCKS]
    return [(4, 32), (8, 32), (8, 64)] if PLANS[name][0] > 64 else [(4, 32), (8, 32)]


def instances() -> list[Instance]:
    """Every kernel that is compiled."""
    return [Instance(name, c, t) for name in PLANS for c, t in _variants(name)]


def compiled_plans(head_dim: int, rope_block: int) -> list[LayerPlan]:
    """Plans with a kernel for this head_dim and rope block (0: none), whatever the number of query heads."""
    found = [i for i in instances() if (i.columns, i.rope_block) == (8, rope_block or 32)]
    return [PLANS[i.plan_name][1] for i in found if PLANS[i.plan_name][0] == head_dim]


def find_instance(plan: LayerPlan, head_dim: int, columns: int, rope_block: int) -> Instance | None:
    """The kernel for these compile-time parameters, or None if there is none."""
    for i in instances():
        if (i.columns, i.rope_block) == (columns, rope_block or 32) and PLANS[i.plan_name] == (head_dim, plan):
            return i
    return None


def write_instances(folder: Path) -> list[Path]:
    """Write csrc/decode_*.cu; returns the files."""
    files = []
    for instance in instances():
        path = folder / f"{instance.name}.cu"
        path.write_text(instance.source())
        files.append(path)
    return files


if __name__ == "__main__":
    write_instances(Path(sys.argv[1]))
