# SPDX-License-Identifier: Apache-2.0
"""The Triton implementation: the same pages on every GPU that Triton compiles for, without the CUDA extension.

Fixed shapes are compile-time constants, so every layer plan gets kernels of its own; operands of matrix
products are float16, accumulation float32. In Triton's interpreter (TRITON_INTERPRET=1) it runs on a CPU.
"""

from __future__ import annotations

import importlib.util


def available() -> tuple[bool, str]:
    """Whether `TritonOps` can run here, and if not, why."""
    if importlib.util.find_spec("triton") is None:
        return False, "the triton package is not installed"
    import torch
    import triton

    if triton.knobs.runtime.interpret:
        return True, ""
    if not torch.cuda.is_available():
        return False, "no CUDA or ROCm device is visible to PyTorch"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (7, 5):
        return False, "the GPU is older than compute capability 7.5"
    return True, ""


def __getattr__(name: str) -> object:
    if name != "TritonOps":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm_kqsvd.ops.triton.layer_ops import TritonOps

    return TritonOps
