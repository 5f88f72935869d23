# SPDX-License-Identifier: Apache-2.0
"""Every call of the kernels in a running engine against the reference: chunks, prefix hits, crowds, preemption.

On a GPU the CUDA and Triton kernels are watched, on the CPU the CPU ones.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.attention.conftest import engine
from tests.attention.models import write_model, write_projection
from tests.attention.runs import generate, prompt_of
from tests.attention.shadowed import Watch, watch_engine

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
ON_GPU = torch.cuda.is_available()
KERNELS = ("cuda", "triton") if ON_GPU else ("cpu",)
ROUNDING = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 2e-2}  # relative, per query row
CODES = {"float32": 1e-3, "float16": 0.01, "bfloat16": 0.01}  # share of bytes on the other side of a threshold


def watched(folder: Path, dtype: str, kernels: str, **options: object) -> Watch:
    """All ways of filling and reading the cache, under watch."""
    options = {"kqsvd": {"implementation": kernels}, "num_gpu_blocks_override": 48, "dtype": dtype, **options}
    with engine(folder / "model", folder / "p4", **options) as llm:
        watch = watch_engine(llm)
        prompt = prompt_of(290, seed=1)
        generate(llm, [prompt_of(n, seed=n) for n in (1, 3, 17, 40)])
        generate(llm, [prompt]), generate(llm, [[*prompt, 5, 6]])  # chunks, then a prefix hit
        generate(llm, [prompt_of(20, seed=4) * 8], max_tokens=24)  # something to speculate on
        generate(llm, [prompt_of(100, seed=200 + n) for n in range(10)], max_tokens=60)  # preemption
    return watch


def check(watch: Watch, dtype: str, *kinds: str) -> None:
    """Errors are rounding, in every kind of request."""
    assert set(kinds) <= set(watch.attend), watch
    assert max(watch.attend.values()) < ROUNDING[dtype], watch.attend
    assert watch.differing < CODES[dtype] and not watch.windows_differ, watch


@pytest.mark.parametrize("kernels", KERNELS)
def test_every_call_agrees_with_the_reference(tiny: Path, kernels: str) -> None:
    dtype = "bfloat16" if ON_GPU else "float32"
    check(watched(tiny, dtype, kernels), dtype, "decode", "prompt", "whole prompt")


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("kernels", [*KERNELS, "cuda+triton"])
def test_verify_batches_agree_with_the_reference(tiny: Path, kernels: str) -> None:
    check(watched(tiny, "float16", kernels, speculative_config=NGRAM), "float16", "decode", "verify")


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_wide_heads(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", head_dim=128)
    write_projection(tmp_path / "p4", model, 4)
    check(watched(tmp_path, "bfloat16", "cuda"), "bfloat16", "decode", "prompt", "whole prompt")
