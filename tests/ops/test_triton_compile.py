# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel compiles for the GPUs it is meant for, without a GPU: PTX through Triton's own ptxas.

The launches of a real step are recorded on the CPU and compiled with the arguments they were made with.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from tests.helpers import random_codec, side_plan
from tests.ops.test_cpu import ragged_step
from vllm_kqsvd.ops import LayerShape
from vllm_kqsvd.plan import LayerPlan

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process (TRITON_INTERPRET=1)", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from vllm_kqsvd.ops.triton import TritonOps, decode, dequantize, merge, prefill, store  # noqa: E402

TYPES = {
    torch.uint8: "*u8",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
KERNELS = [
    (store, "store_kernel"),
    (store, "store_exact_kernel"),
    (decode, "split_kernel"),
    (merge, "merge_kernel"),
    (dequantize, "dequantize_kernel"),
    (prefill, "prefill_kernel"),
]
TARGETS = {"sm_90": 90, "sm_80": 80}
SHARED = 99 * 1024  # what a block may have on sm_86 and sm_89, the least of all targets


class Recorder:
    """Stands in for a kernel and keeps its launches."""

    def __init__(self, kernel, launches) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


def compile_launch(kernel, args, kwargs, arch: int):
    """The compiled kernel of a recorded launch for an NVIDIA GPU of compute capability `arch` / 10."""
    options = {k: kwargs[k] for k in ("num_warps", "num_stages", "maxnreg") if k in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | {k: v for k, v in kwargs.items() if k not in options}
    signature, constants, attrs = {}, {}, {}
    for i, param in enumerate(kernel.params):
        value = values[param.name]
        if param.is_constexpr:
            signature[param.name], constants[param.name] = "constexpr", value
            continue
        signature[param.name] = TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attrs)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def launches(monkeypatch, ops, dtype):
    """Launches of one store, one decode and one prefill step."""
    found: list = []
    for module, name in KERNELS:
        monkeypatch.setattr(module, name, Recorder(getattr(module, name), found))
    s = ops.shape
    step = ragged_step([200, 77], [3, 1], s.block_size, s.window_block_size, torch.Generator().manual_seed(0))
    pages = torch.zeros(32, ops.codec.layout.page_bytes(s.num_kv_heads, s.block_size), dtype=torch.uint8)
    window = torch.zeros(32, s.num_kv_heads, s.window_block_size, 2 * s.head_dim, dtype=dtype)
    key = torch.zeros(4, s.num_kv_heads, s.head_dim, dtype=dtype)
    query = torch.zeros(4, s.num_heads, s.head_dim, dtype=dtype)
    slots = torch.arange(4)
    ops.store(key, key, pages, window, slots, slots, step.positions)
    for decodes in (2, 0):
        ops.attend(query, key, key, pages, window, replace(step, num_decodes=decodes), torch.empty_like(query))
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile(monkeypatch, tmp_path, target):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    plan = LayerPlan(side_plan(4, 2, 2), side_plan(2, 2, 2, 2))
    ops = TritonOps(random_codec(plan, heads=2, dim=64), LayerShape(8, 2, 64, 32, 16, 0.1, torch.bfloat16, 64))
    compiled = {}
    for kernel, args, kwargs in launches(monkeypatch, ops, torch.bfloat16):
        compiled[kernel.__name__] = compile_launch(kernel, args, kwargs, TARGETS[target])
    assert set(compiled) == {name for _, name in KERNELS}
    for name, kernel in compiled.items():
        assert kernel.metadata.shared <= SHARED, f"{name} wants {kernel.metadata.shared} bytes of shared memory"
