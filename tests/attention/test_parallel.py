# SPDX-License-Identifier: Apache-2.0
"""Several workers answer as one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.attention.conftest import engine
from tests.attention.models import write_model, write_projection
from tests.attention.runs import generate, prompt_of
from tests.attention.test_processes import tokens_of

pytestmark = pytest.mark.slow

SPAWN = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
PROMPTS = [*(prompt_of(n, seed=n) for n in (3, 40)), prompt_of(300, seed=9)]
EAGER: dict[str, object] = {"enforce_eager": True, "skip_tokenizer_init": True}


def prepared(folder: Path, **overrides: object) -> list[list[int]]:
    """Write a model and its projection; tokens of one worker in this process."""
    write_projection(folder / "p8", write_model(folder / "model", **overrides))
    with engine(folder / "model", folder / "p8", max_num_batched_tokens=512) as llm:
        return [r.tokens for r in generate(llm, PROMPTS)]


def test_three_tensor_parallel_ranks(tmp_path: Path) -> None:
    shape = {"hidden_size": 192, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 384}
    alone = prepared(tmp_path, **shape, vocab_size=576)
    options = {**EAGER, "tensor_parallel_size": 3}
    assert tokens_of(tmp_path, options, **SPAWN, VLLM_CPU_OMP_THREADS_BIND="0|1|0") == alone
