# SPDX-License-Identifier: Apache-2.0
"""Speculation: several query rows per request and rejected rows in both caches; in bfloat16, at 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.attention.conftest import engine
from tests.attention.models import write_unequal
from tests.attention.runs import Run, assert_agree, generate, prompt_of

PROMPTS = [prompt_of(20, seed=4) * 8, *(prompt_of(n, seed=n) for n in (1, 17, 40))]
ROUNDING = 0.3  # logprobs of a bfloat16 model; a speculated row also sees a later window start


def answers(tiny: Path, projection: Path, **options: Any) -> tuple[list[Run], float]:
    """Runs of PROMPTS in an engine of their own, and how many tokens were drafted."""
    with engine(tiny / "model", projection, dtype="bfloat16", max_num_batched_tokens=256, **options) as llm:
        runs = generate(llm, PROMPTS, max_tokens=24)
        drafted = [m.value for m in llm.get_metrics() if m.name == "vllm:spec_decode_num_draft_tokens"]
        return runs, sum(drafted)


@pytest.mark.parametrize("layers", ["equal", "unequal"])
def test_ngram_speculation(tiny: Path, tmp_path: Path, layers: str) -> None:
    projection = tiny / "p4" if layers == "equal" else write_unequal(tmp_path / "p", tiny / "p4", tiny / "p8")
    plain, _ = answers(tiny, projection)
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    spoken, drafted = answers(tiny, projection, speculative_config=ngram)
    assert drafted > 0
    for a, b in zip(plain, spoken, strict=True):
        assert_agree(a, b, ROUNDING)
