# SPDX-License-Identifier: Apache-2.0
"""Layers of unequal bytes in real vLLM on the CPU: pages side by side in one block, one block table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.attention.conftest import engine
from tests.attention.models import write_unequal
from tests.attention.runs import assert_agree, assert_preempted_requests_resume, generate, prompt_logprobs, prompt_of
from vllm_kqsvd.errors import UnsupportedError

LOSS = 0.2  # logprob difference that a 4-bit layer between two of 8 bits may cause in this model
LONG = prompt_of(300, seed=9)


@pytest.fixture(scope="module")
def exact(tiny: Path) -> list[float]:
    """Logprobs of LONG by vLLM's own backend."""
    with engine(tiny / "model", None) as llm:
        return prompt_logprobs(llm, LONG)


@pytest.fixture(scope="module")
def llm(tiny: Path, exact: list[float], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Layers of 8, 4 and 8 bits, prompts read in chunks of 64 tokens, 48 blocks of cache."""
    folder = write_unequal(tmp_path_factory.mktemp("unequal") / "p", tiny / "p8", tiny / "p4")
    with engine(tiny / "model", folder, num_gpu_blocks_override=48) as made:
        yield made


def test_one_latent_group_with_pages_side_by_side(llm: Any) -> None:
    config = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
    assert [len(g.layer_names) for g in config.kv_cache_groups] == [3, 3]
    assert [g.kv_cache_spec.block_size for g in config.kv_cache_groups] == [128, 16]
    assert llm.llm_engine.vllm_config.cache_config.kv_cache_layout == "BLHNC"
    block = 2 * 128 * (130 + 66 + 130)
    assert {(t.block_stride, t.size) for t in config.kv_cache_tensors} == {(block, 48 * block)}


def test_report_agrees_with_vllm(llm: Any) -> None:
    from vllm_kqsvd.attention.report import report_lines, status_of

    config = llm.llm_engine.vllm_config
    impls = [x.impl for x in config.compilation_config.static_forward_context.values() if hasattr(x, "impl")]
    lines = "\n".join(report_lines(config, impls, status_of(config, impls, config.cache_config.num_gpu_blocks)))
    assert f"{config.cache_config.kv_cache_size_tokens:,} instead of" in lines
    assert "652 bytes instead of 3,072 (4.71x), 6.79 bits per element (layers 4.12 to 8.12), scales" in lines


def test_layers_of_all_sizes_share_what_a_step_builds(llm: Any) -> None:
    """vLLM makes a metadata builder for every page size; positions, schedules and tables are made once."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    latent = runner.attn_groups[0]
    assert sorted(len(g.layer_names) for g in latent) == [1, 2]
    seen: list[Any] = []
    builders = [g.get_metadata_builder() for g in latent]
    for builder in builders:
        original = builder.build

        def spy(*args: Any, build: Any = original, **options: Any) -> Any:
            seen.append(build(*args, **options))
            return seen[-1]

        builder.build = spy
    generate(llm, [prompt_of(5, seed=3)], max_tokens=2)
    for builder in builders:
        del builder.build
    assert len(seen) == 4
    assert seen[0] is seen[1]
    assert seen[2] is seen[3]
    assert seen[0] is not seen[2]


def test_caches_beyond_the_reach_of_kernels_are_refused(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_kqsvd.attention.native import compressed
    from vllm_kqsvd.attention.report import check_reach

    config = llm.llm_engine.vllm_config
    impls, block = compressed(config), 2 * 128 * (130 + 66 + 130)
    monkeypatch.setattr(type(impls[0].ops), "max_cache_bytes", 48 * block)
    check_reach(config, impls, 48)
    with pytest.raises(UnsupportedError, match="layers side by side found; the cpu kernels reach 0 GiB"):
        check_reach(config, impls, 49)


def test_chunked_prefill_reads_latents(llm: Any, exact: list[float]) -> None:
    ours = prompt_logprobs(llm, LONG)
    difference = [abs(a - b) for a, b in zip(ours, exact, strict=True)]
    assert max(difference[:127]) < 1e-4  # two chunks: all in the window
    assert 0 < sum(difference[127:]) / len(difference[127:]) < LOSS / 3


def test_prefix_hit_changes_only_time(llm: Any) -> None:
    prompt = prompt_of(290, seed=1)
    first, again = generate(llm, [prompt])[0], generate(llm, [prompt])[0]
    assert (first.cached, again.cached) == (0, 256)
    assert_agree(first, again, LOSS)


def test_preemption_and_resumption(llm: Any) -> None:
    assert_preempted_requests_resume(llm, LOSS)
