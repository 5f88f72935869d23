# SPDX-License-Identifier: Apache-2.0
"""Loading the CUDA extension (torch.ops.kqsvd) and saying why it cannot be used."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

LIBRARY = Path(__file__).resolve().parents[1] / "_C.abi3.so"
OPERATORS = ("store_latent", "dequantize", "token_positions", "merge_attention")
BUILD = "build it with `KQSVD_BUILD_CUDA=1 python setup.py build_ext --inplace`, or install a wheel that has it"


def _nothing(*args: object) -> None:
    """What every operator of the extension returns: it writes into its arguments."""


@lru_cache(maxsize=1)
def load() -> str:
    """Register the extension's operators, once. Returns "" or why that is impossible."""
    if not LIBRARY.exists():
        return f"the CUDA extension {LIBRARY.name} is not in this installation; {BUILD}"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as e:
        return f"the CUDA extension does not load into PyTorch {torch.__version__}: {e}; {BUILD}"
    for name in OPERATORS:
        if not hasattr(torch.ops.kqsvd, name):
            return f"the CUDA extension lacks {name}: it belongs to another version; {BUILD}"
        torch.library.register_fake(f"kqsvd::{name}", _nothing)
    return ""


@lru_cache(maxsize=8)
def _runs_on(device: int) -> str:
    """Launch the smallest kernel on a device: "" or why its GPU cannot run the extension's code."""
    start = torch.tensor([0, 1], dtype=torch.int32, device=f"cuda:{device}")
    out = torch.full((1,), -1, dtype=torch.int64, device=start.device)
    try:
        torch.ops.kqsvd.token_positions(start, start[1:] + 6, out)
        same = int(out) == 6
    except RuntimeError as e:
        name, why = torch.cuda.get_device_name(device), str(e).splitlines()[0]
        if torch.cuda.get_device_capability(device) != (9, 0):
            return f"{name} cannot run the CUDA extension ({why}); it is compiled for sm_90a (H100, H200)"
        return f"{name} cannot run the CUDA extension ({why}); {BUILD}"
    return "" if same else "the CUDA extension gave a wrong result on its smallest kernel"


def available() -> tuple[bool, str]:
    """Whether the extension's kernels run on the current GPU, and if not, why."""
    if not torch.cuda.is_available():
        return False, "no CUDA device is visible to PyTorch"
    if torch.version.hip is not None:
        return False, "this PyTorch is built for ROCm; the CUDA extension needs an NVIDIA GPU"
    why = load() or _runs_on(torch.cuda.current_device())
    return not why, why
