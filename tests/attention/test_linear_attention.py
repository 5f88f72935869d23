# SPDX-License-Identifier: Apache-2.0
"""Qwen3-Next: states of linear attention beside latents, and prefix hits within a block of both."""

from __future__ import annotations

from pathlib import Path

from tests.attention.conftest import engine
from tests.attention.models import write_projection, write_qwen3_next
from tests.attention.runs import assert_agree, generate, prompt_of

LONG = prompt_of(300, seed=9)
ROUNDING = 0.3  # logprobs of a bfloat16 model


def test_linear_attention(tmp_path: Path) -> None:
    model = write_qwen3_next(tmp_path / "model")
    projection = write_projection(tmp_path / "p8", model, layers=[3])
    options = {"dtype": "bfloat16", "kv_cache_memory_bytes": 32 << 20, "max_model_len": 1024}
    prompts = [prompt_of(40, 1), LONG]
    with engine(model, None, **options) as llm:
        theirs = generate(llm, prompts)
    del llm  # or it would go, and its process groups with it, while the next one is at work
    with engine(model, projection, **options) as llm:
        groups = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
        kinds = [type(g.kv_cache_spec).__name__ for g in groups]
        ours, again = generate(llm, prompts), generate(llm, [[*LONG, 5, 6], LONG])
    assert sorted(kinds) == ["FullAttentionSpec", "MambaSpec", "MambaSpec", "MambaSpec", "WindowSpec"]
    assert len({g.kv_cache_spec.page_size_bytes for g in groups}) == 1
    for a, b in zip(theirs, ours, strict=True):
        assert_agree(a, b, ROUNDING)
    assert again[1].cached
    assert_agree(ours[1], again[1], ROUNDING)
