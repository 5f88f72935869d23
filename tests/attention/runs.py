# SPDX-License-Identifier: Apache-2.0
"""Prompts, greedy runs and their comparison up to rounding."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from tests.attention.models import VOCAB


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """A random prompt without special tokens."""
    rng = random.Random(seed)
    return [rng.randrange(3, VOCAB) for _ in range(length)]


@dataclass(frozen=True)
class Run:
    """Greedy continuation: tokens, logprob of each, and the two best (token, logprob) at each step."""

    tokens: list[int]
    best: list[list[tuple[int, float]]]
    cached: int

    @classmethod
    def of(cls, output: Any, sample: int = 0) -> Run:
        """From a sample of a RequestOutput with logprobs=2."""
        done = output.outputs[sample]
        best = [sorted(((t, x.logprob) for t, x in d.items()), key=lambda p: -p[1])[:2] for d in done.logprobs]
        return cls(list(done.token_ids), best, output.num_cached_tokens or 0)


def generate(llm: Any, prompts: list[list[int]], max_tokens: int = 8, **options: Any) -> list[Run]:
    """Greedy runs of token prompts."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=2, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False, **options)
    return [Run.of(o) for o in outputs]


def assert_agree(a: Run, b: Run, tolerance: float) -> None:
    """Equal tokens with logprobs within `tolerance`, up to a step where both best tokens are that close."""
    for i, (s, t) in enumerate(zip(a.best, b.best, strict=True)):
        if s[0][0] != t[0][0]:
            gap = s[0][1] - s[1][1]
            assert gap < 2 * tolerance, f"step {i}: token {t[0][0]} instead of {s[0][0]}, {gap:.3f} apart"
            return
        assert abs(s[0][1] - t[0][1]) < tolerance, f"step {i}: logprob {t[0][1]:.4f} instead of {s[0][1]:.4f}"


def prompt_logprobs(llm: Any, prompt: list[int]) -> list[float]:
    """Logprob of every prompt token after the first, each computed on the cache of the chunks before."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    output = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0]
    return [next(iter(d.values())).logprob for d in output.prompt_logprobs[1:]]


def assert_preempted_requests_resume(llm: Any, tolerance: float) -> None:
    """Ten requests in a cache too small for them: some are preempted, and the last ones answer as they do alone."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    preempted = []
    original = scheduler._preempt_request
    scheduler._preempt_request = lambda *a, **k: (preempted.append(1), original(*a, **k))[1]
    prompts = [prompt_of(100, seed=200 + n) for n in range(10)]
    crowd = generate(llm, prompts, max_tokens=60)
    scheduler._preempt_request = original
    assert preempted
    for run, prompt in zip(crowd[-3:], prompts[-3:], strict=True):
        assert_agree(generate(llm, [prompt], max_tokens=60)[0], run, tolerance)
