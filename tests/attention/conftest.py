# SPDX-License-Identifier: Apache-2.0
"""Engines of real vLLM on the CPU, in this process, one at a time; shared by the tests of a module."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model` (tiny random Llama, float32) and projections `p8` and `p4`."""
    from tests.attention.models import write_model, write_projection

    folder = tmp_path_factory.mktemp("tiny")
    model = write_model(folder / "model")
    for bits in (8, 4):
        write_projection(folder / f"p{bits}", model, bits)
    return folder


@pytest.fixture(scope="session", autouse=True)
def quiet_cpu() -> None:
    """One thread, no core binding, engine core in this process."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"


def hide_special_names() -> None:
    """Make llvmlite's library object, which ngram speculation loads, say that it has no `__dict__`.

    It looks up any name in the C library, `__dict__` too, and vLLM's `register_kernels`, which reads the attributes
    of every object in every module, then stops the second engine of a process.
    """
    ffi = sys.modules.get("llvmlite.binding.ffi")
    if ffi is None or not hasattr(ffi.lib, "__dict__"):
        return
    library = type(ffi.lib)
    look_up = library.__getattr__

    def only_ordinary_names(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return look_up(self, name)

    library.__getattr__ = only_ordinary_names


@contextmanager
def engine(model: Path, projection: Path | None, **options: Any) -> Iterator[Any]:
    """A `vllm.LLM`; without a projection it runs natively. Everything is torn down afterwards."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    hide_special_names()
    extra = options.pop("kqsvd", {})
    if projection is not None:
        options["attention_backend"] = "CUSTOM"
        options["additional_config"] = {"kqsvd": {"projection": str(projection), **extra}}
    options = {
        "dtype": "float32", "max_model_len": 512, "kv_cache_memory_bytes": 8 << 20, "enforce_eager": True,
        "max_num_batched_tokens": 64, "max_num_seqs": 16, "disable_log_stats": False, **options,
    }  # fmt: skip
    llm = LLM(str(model), **options)
    try:
        yield llm
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
