# SPDX-License-Identifier: Apache-2.0
"""Greedy answers over HTTP: alone, in a crowd, broken off, and how far one may differ from the other.

Batches of other sizes change the order of sums in a model's matrix products (vLLM is not batch invariant), and a
prompt read in other chunks, after a prefix hit or after preemption attends latents where it attended exact rows before
(docs/window.md). An answer may therefore part from the solo run where two tokens are nearly equal, and only there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import aiohttp

    from benchmarks.demo_server import Server

Json = dict[str, Any]
BEST = 20  # tokens whose distance from the best a solo run records; vLLM's default limit


def body_of(prompt: list[int], max_tokens: int, **more: object) -> Json:
    """A greedy completion of token ids that returns token ids."""
    return {
        "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True,
        **more,
    }  # fmt: skip


@dataclass(frozen=True)
class Solo:
    """What a prompt answers alone: tokens, and at each step how far the best tokens are behind the very best."""

    tokens: list[int]
    behind: list[dict[int, float]]  # token -> difference of log probabilities


def solo(server: Server, prompt: list[int], max_tokens: int, seconds: float = 120) -> Solo:
    """The greedy answer while the server does nothing else."""
    body = body_of(prompt, max_tokens, logprobs=BEST, return_tokens_as_token_ids=True)
    choice = server.post(body, seconds)["choices"][0]
    steps = [
        {int(token.removeprefix("token_id:")): p for token, p in step.items()}
        for step in choice["logprobs"]["top_logprobs"]
    ]
    return Solo(choice["token_ids"], [{t: max(d.values()) - p for t, p in d.items()} for d in steps])


@dataclass(frozen=True)
class Parted:
    """Where an answer left the solo run: at this step, for a token this far behind the solo run's best."""

    step: int
    behind: float


def compare(alone: Solo, got: list[int]) -> Parted | None:
    """Where the answer (or the part of it there is) parts from the solo run; None if nowhere."""
    for i, (a, b) in enumerate(zip(alone.tokens, got, strict=False)):
        if a != b:
            return Parted(i, alone.behind[i].get(b, float("inf")))
    return None if len(got) <= len(alone.tokens) else Parted(len(alone.tokens), float("inf"))


async def streamed(session: aiohttp.ClientSession, url: str, body: Json, leave_after: int | None = None) -> list[int]:
    """Tokens of one streamed answer; with `leave_after` the connection is closed after so many.

    Raises RuntimeError for an HTTP status or an end that is not the server's.
    """
    tokens: list[int] = []
    done = 0
    async with session.post(url + "/v1/completions", json={**body, "stream": True}) as answer:
        if answer.status != 200:
            raise RuntimeError(f"status {answer.status}: {(await answer.text())[:200]}")
        async for line in answer.content:
            text = line.decode().strip()
            if text == "data: [DONE]":
                done += 1
            elif text.startswith("data: "):
                event = json.loads(text[6:])
                if "choices" not in event:
                    raise RuntimeError(f"an error in the stream: {text[:200]}")
                tokens += event["choices"][0].get("token_ids") or []
                if leave_after is not None and len(tokens) >= leave_after:
                    return tokens
    if len(tokens) != body["max_tokens"] or done != 1:
        raise RuntimeError(f"a stream of {len(tokens)} tokens instead of {body['max_tokens']}, {done} ends")
    return tokens
