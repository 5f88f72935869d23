# SPDX-License-Identifier: Apache-2.0
"""Steps built from vLLM's common metadata: decode split, positions, the window's table."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata  # noqa: E402

from vllm_kqsvd.attention.metadata import KQSVDMetadataBuilder, WindowMetadata  # noqa: E402


def builder_with(threshold: int = 1, planned: list | None = None) -> KQSVDMetadataBuilder:
    """A builder without an engine around it."""
    made = object.__new__(KQSVDMetadataBuilder)
    made.reorder_batch_threshold, made._nan_guard = threshold, None
    made._positions = torch.zeros(64, dtype=torch.int64)
    made._ops = SimpleNamespace(plan_step=lambda step: None if planned is None else planned.append(step) or "plan")
    return made


def common(q_lens: list[int], seq_lens: list[int], positions: torch.Tensor | None) -> CommonAttentionMetadata:
    """Metadata of one step."""
    starts = torch.tensor([0, *torch.tensor(q_lens).cumsum(0).tolist()], dtype=torch.int32)
    lengths = torch.tensor(seq_lens, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        seq_lens_cpu_upper_bound=lengths,
        num_reqs=len(q_lens),
        num_actual_tokens=sum(q_lens),
        max_query_len=max(q_lens),
        max_seq_len=max(seq_lens),
        block_table_tensor=torch.zeros(len(q_lens), 4, dtype=torch.int32),
        slot_mapping=torch.zeros(sum(q_lens), dtype=torch.int64),
        positions=positions,
    )


def test_positions_are_the_runners_or_computed() -> None:
    q_lens, seq_lens = [1, 1, 5, 3], [9, 1, 5, 20]
    expected = torch.tensor([8, 0, 0, 1, 2, 3, 4, 17, 18, 19])
    mine = builder_with().build(0, common(q_lens, seq_lens, None)).step.positions
    assert torch.equal(mine, expected)
    assert builder_with().build(0, common(q_lens, seq_lens, expected)).step.positions is expected


@pytest.mark.parametrize(("threshold", "decodes", "tokens", "longest"), [(1, 2, 2, 1), (4, 3, 5, 3)])
def test_decode_split(threshold: int, decodes: int, tokens: int, longest: int) -> None:
    step = builder_with(threshold).build(0, common([1, 1, 3, 9], [4, 5, 6, 9], None)).step
    assert (step.num_decodes, step.num_decode_tokens, step.max_decode_len) == (decodes, tokens, longest)
    assert (step.num_reqs, step.num_tokens) == (4, 14)


def test_prompts_only() -> None:
    step = builder_with().build(0, common([7], [7], None)).step
    assert (step.num_decodes, step.max_decode_len) == (0, 1)


def test_planned_once_and_window_joined_once() -> None:
    planned: list = []
    metadata = builder_with(planned=planned).build(0, common([1], [3], None))
    assert len(planned) == 1 and metadata.step.plan == "plan"
    window = WindowMetadata(torch.ones(1, 2, dtype=torch.int32), torch.zeros(1))
    step = metadata.with_window(window)
    assert step.window_block_table is window.block_table and metadata.with_window(window) is step


@pytest.mark.parametrize(("safe", "expected"), [(True, "UNIFORM_SINGLE_TOKEN_DECODE"), (False, "NEVER")])
def test_graph_support_follows_the_kernels(safe: bool, expected: str) -> None:
    from vllm_kqsvd.attention.impl import KQSVDImpl

    impl = object.__new__(KQSVDImpl)
    impl._ops = SimpleNamespace(name="cuda", graph_safe=safe)  # type: ignore[assignment]
    impl.config = SimpleNamespace(check_nan=False)  # type: ignore[assignment]
    context = {"a": SimpleNamespace(impl=impl)}
    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=context))
    support = KQSVDMetadataBuilder.get_cudagraph_support(config, None)  # type: ignore[arg-type]
    assert support is AttentionCGSupport[expected]
