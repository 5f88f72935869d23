# SPDX-License-Identifier: Apache-2.0
"""Models that mix kinds of attention: layers with the whole context are compressed, the others stay native."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.attention.conftest import engine
from tests.attention.models import write_gemma3, write_projection
from tests.attention.runs import Run, assert_agree, generate, prompt_logprobs, prompt_of

LOSS = 0.15
PROMPTS = [prompt_of(n, seed=n) for n in (1, 17, 40)]  # within both windows
LONG = prompt_of(300, seed=9)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Gemma-3 (4 sliding-window layers, 2 of the whole context) and a projection."""
    folder = tmp_path_factory.mktemp("gemma")
    write_projection(folder / "p8", write_gemma3(folder / "model"), layers=[2, 5])
    return folder


@pytest.fixture(scope="module")
def native(gemma: Path) -> tuple[list[Run], list[float]]:
    """vLLM's own answers."""
    with engine(gemma / "model", None) as llm:
        return generate(llm, [*PROMPTS, LONG]), prompt_logprobs(llm, LONG)


@pytest.fixture(scope="module")
def llm(gemma: Path, native: object) -> Iterator[Any]:
    """The plugin on the same model."""
    with engine(gemma / "model", gemma / "p8", num_gpu_blocks_override=96) as made:
        yield made


def test_groups_share_pages(llm: Any) -> None:
    groups = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
    kinds = [(type(g.kv_cache_spec).__name__, len(g.layer_names), g.kv_cache_spec.block_size) for g in groups]
    native, latent, window = ("SlidingWindowSpec", 2, 32), ("FullAttentionSpec", 2, 128), ("WindowSpec", 2, 32)
    assert sorted(kinds) == sorted([native, native, latent, window])
    assert len({g.kv_cache_spec.page_size_bytes for g in groups}) == 1


def test_answers(llm: Any, native: tuple[list[Run], list[float]]) -> None:
    ours = generate(llm, [*PROMPTS, LONG])
    for a, b in zip(ours[:3], native[0][:3], strict=True):
        assert a.tokens == b.tokens
    assert_agree(native[0][3], ours[3], LOSS)
    scored = prompt_logprobs(llm, LONG)
    difference = [abs(a - b) for a, b in zip(scored, native[1], strict=True)]
    assert max(difference[:127]) < 1e-3 and 0 < sum(difference[127:]) / len(difference[127:]) < LOSS / 3


def test_prefix_hit_and_crowd(llm: Any) -> None:
    first, again = generate(llm, [LONG])[0], generate(llm, [LONG])[0]
    assert again.cached == 256
    assert_agree(first, again, LOSS)
    crowd = generate(llm, [prompt_of(100 + n, seed=200 + n) for n in range(8)], max_tokens=30)
    alone = generate(llm, [prompt_of(100, seed=200)], max_tokens=30)[0]
    assert_agree(alone, crowd[0], LOSS)


def test_report_agrees_with_vllm(llm: Any) -> None:
    from vllm_kqsvd.attention.report import report_lines, status_of

    config = llm.llm_engine.vllm_config
    layers = config.compilation_config.static_forward_context.values()
    impls = [x.impl for x in layers if hasattr(getattr(x, "impl", None), "ops")]
    status = status_of(config, impls, config.cache_config.num_gpu_blocks)
    assert status.kv_tokens == config.cache_config.kv_cache_size_tokens
    lines = "\n".join(report_lines(config, impls, status))
    assert "2 of 6 attention layers compressed, 4 keep vLLM's own cache" in lines


def test_more_compressed_layers_than_native_ones(tmp_path: Path) -> None:
    """vLLM makes groups as large as the smallest kind; one report speaks for all compressed layers."""
    from vllm_kqsvd.status import read_all

    write_projection(tmp_path / "p8", write_gemma3(tmp_path / "model", "sfff"), layers=[1, 2, 3])
    with engine(tmp_path / "model", tmp_path / "p8", num_gpu_blocks_override=96) as made:
        groups = made.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
        assert [len(g.layer_names) for g in groups] == [1] * 7
        (status,) = read_all()
        assert sum(n for kind, n in status.layers.items() if not kind.startswith("native")) == 3
        assert status.kv_tokens == made.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
        context = made.llm_engine.vllm_config.compilation_config.static_forward_context.values()
        guarded = [x.impl.nan_guard is not None for x in context if hasattr(getattr(x, "impl", None), "nan_guard")]
        assert guarded == [False, False, True]


def test_padding_is_said() -> None:
    from types import SimpleNamespace

    from vllm.v1.attention.backend import MultipleOf

    from vllm_kqsvd.attention.native import Fit, better_block_sizes, fit, padding_warning

    def layers(found: Fit | None) -> list[Any]:
        backend = SimpleNamespace(fitted=found, get_supported_kernel_block_sizes=lambda: [MultipleOf(16)])
        return [SimpleNamespace(get_attn_backend=lambda: backend)] * 4

    four, three = fit(1024, 128 * 260, 16, 128), fit(1024, 128 * 196, 16, 128)  # bytes of 4 and 3 bits
    assert four == Fit(32, 1024, 33280) and padding_warning(layers(four), 260) is None
    assert three == Fit(16, 1024, 25088) and round(three.lost, 2) == 0.35
    assert better_block_sizes(1024, 196, 16, three)[0] == 192
    assert "loses 35 % of their memory; --block-size 192 would lose less" in str(padding_warning(layers(three), 196))
    assert fit(1024, 64 * 66, 16, 64) is None and padding_warning([], 66) is None
