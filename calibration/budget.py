# SPDX-License-Identifier: Apache-2.0
"""How many bits per element a command is asked for: by preset, number or ratio."""

from __future__ import annotations

import argparse

from vllm_kqsvd.calibration.calibrate import PRESETS, bits_of_ratio
from vllm_kqsvd.errors import ConfigError


def add_budget(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """--preset, --bits or --ratio, one of them."""
    budget = parser.add_mutually_exclusive_group(required=required)
    presets = ", ".join(f"{name} {bits:g}" for name, bits in PRESETS.items())
    default = "" if required else " (default balanced)"
    budget.add_argument("--preset", choices=tuple(PRESETS), help=f"bits per element by name: {presets}{default}")
    budget.add_argument("--bits", type=float, help="bits per element of K and V")
    budget.add_argument("--ratio", metavar="N[x]", help="compression against a 16-bit cache, e.g. 5x")


def bits_asked(args: argparse.Namespace, head_dim: int) -> float:
    """Bits per element from parsed arguments. Raises ConfigError for a ratio that is no number."""
    if args.bits is not None:
        return float(args.bits)
    if args.ratio is not None:
        try:
            ratio = float(str(args.ratio).lower().rstrip("x"))
        except ValueError as e:
            raise ConfigError(f"--ratio {args.ratio!r} is not a number; give e.g. 5x") from e
        return bits_of_ratio(ratio, head_dim)
    return PRESETS[args.preset or "balanced"]
