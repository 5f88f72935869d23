# SPDX-License-Identifier: Apache-2.0
"""Real vLLM on the CPU: the plugin against vLLM's own backend on a tiny model, with a nearly lossless projection."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.attention.conftest import engine
from tests.attention.runs import (
    Run,
    assert_agree,
    assert_preempted_requests_resume,
    generate,
    prompt_logprobs,
    prompt_of,
)

LOSS = 0.15  # logprob difference that 8-bit latents may cause in this model
SHORT = [prompt_of(n, seed=n) for n in (1, 3, 17, 40)]  # with 8 new tokens all within the exact window
LONG = prompt_of(300, seed=9)


@dataclass(frozen=True)
class Native:
    """What vLLM's own backend answers."""

    short: list[Run]
    long: Run
    scored: list[float]
    backend: str


@pytest.fixture(scope="module")
def native(tiny: Path) -> Native:
    """Runs without the flag, the plugin being installed."""
    with engine(tiny / "model", None) as llm:
        context = layers_of(llm)
        backend = next(iter(context.values())).get_attn_backend().__name__
        scored = prompt_logprobs(llm, LONG)
        return Native(generate(llm, SHORT), generate(llm, [LONG])[0], scored, backend)


@pytest.fixture(scope="module")
def llm(tiny: Path, native: Native) -> Iterator[Any]:
    """The plugin with prompts read in chunks of 64 tokens and 48 blocks of cache."""
    with engine(tiny / "model", tiny / "p8", num_gpu_blocks_override=48) as made:
        yield made


def layers_of(llm: Any) -> dict[str, Any]:
    """vLLM's layer table."""
    return llm.llm_engine.vllm_config.compilation_config.static_forward_context


def pool_of(llm: Any) -> Any:
    """The scheduler's block pool."""
    return llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool


def test_installed_but_not_asked_for(native: Native) -> None:
    assert native.backend == "CPUAttentionBackend"


def test_every_layer_has_latents_and_a_window(llm: Any) -> None:
    groups = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
    assert [len(g.layer_names) for g in groups] == [3, 3]
    assert [g.kv_cache_spec.block_size for g in groups] == [128, 32]
    assert len({g.kv_cache_spec.page_size_bytes for g in groups}) == 1


def test_report_agrees_with_vllm(llm: Any) -> None:
    from vllm_kqsvd.attention.report import report_lines, status_of

    config = llm.llm_engine.vllm_config
    impls = [x.impl for x in layers_of(llm).values() if hasattr(x, "impl")]
    lines = "\n".join(report_lines(config, impls, status_of(config, impls, config.cache_config.num_gpu_blocks)))
    assert f"{config.cache_config.kv_cache_size_tokens:,} instead of" in lines
    assert "780 bytes instead of 3,072 (3.94x), 8.12 bits per element" in lines


def test_within_the_window_tokens_are_native(llm: Any, native: Native) -> None:
    for ours, theirs in zip(generate(llm, SHORT), native.short, strict=True):
        assert ours.tokens == theirs.tokens


def test_chunked_prefill_reads_latents(llm: Any, native: Native) -> None:
    ours = prompt_logprobs(llm, LONG)
    difference = [abs(a - b) for a, b in zip(ours, native.scored, strict=True)]
    assert max(difference[:127]) < 1e-4  # two chunks: all in the window
    assert 0 < sum(difference[127:]) / len(difference[127:]) < LOSS / 3
    assert_agree(native.long, generate(llm, [LONG])[0], LOSS)


def test_prefix_hit_changes_only_time(llm: Any) -> None:
    prompt = prompt_of(290, seed=1)
    first, again = generate(llm, [prompt])[0], generate(llm, [prompt])[0]
    assert (first.cached, again.cached) == (0, 256)
    assert_agree(first, again, LOSS)
    longer = generate(llm, [[*prompt, 5, 6]])[0]
    assert longer.cached == 256


def test_many_at_once_equal_alone(llm: Any) -> None:
    prompts = [prompt_of(4 + n, seed=100 + n) for n in range(24)]
    together = generate(llm, [*prompts, LONG, prompt_of(200, seed=3)])
    alone = [generate(llm, [p])[0] for p in prompts[:3]]
    for a, b in zip(together, alone, strict=False):
        assert a.tokens == b.tokens
    assert_agree(together[24], generate(llm, [LONG])[0], LOSS)


def test_preemption_and_resumption(llm: Any) -> None:
    assert_preempted_requests_resume(llm, LOSS)


def test_abort_returns_every_block(llm: Any) -> None:
    from vllm import SamplingParams

    free = pool_of(llm).get_num_free_blocks()
    sampling = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    for name in ("kept", "aborted"):
        llm.llm_engine.add_request(name, {"prompt_token_ids": prompt_of(150, seed=len(name))}, sampling)
    for _ in range(8):
        llm.llm_engine.step()
    assert pool_of(llm).get_num_free_blocks() < free
    llm.llm_engine.abort_request(["aborted"])
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    assert pool_of(llm).get_num_free_blocks() == free
