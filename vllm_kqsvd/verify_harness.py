# SPDX-License-Identifier: Apache-2.0
"""Teacher-forced scoring of a model that reads its KV cache through a codec, against the same model without.

One `Window` of text at a time: a reference pass keeps the exact keys and values and the log-probabilities
of the scored tokens; a pass per codec repeats the scored tokens reading the coded cache as serving would.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from vllm_kqsvd.codec import LayerCodec
from vllm_kqsvd.errors import ConfigError
from vllm_kqsvd.layout import TILE
from vllm_kqsvd.ops import reference
from vllm_kqsvd.ops.rope_block import block_start, rotate
from vllm_kqsvd.verify_attention import (
    AttentionCall,
    CodedCache,
    exact_attention,
    handle_attention,
    mixed_attention,
)

LOGIT_ROWS = 16  # every so many scored queries enter the logit-error measurement


class CacheCodec(Protocol):
    """What the harness asks of a cache format."""

    name: str
    group_tokens: int  # tokens coded together; an incomplete group is still exact (1: every token alone)

    def roundtrip(
        self, layer: int, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Key and value [N, H, d] as they come back from the cache, or None for a layer left uncompressed."""


@dataclass
class ProjectionCodec:
    """Ours: the reference quantizer with the codecs of a projection folder, by HF layer index."""

    layers: Mapping[int, LayerCodec]
    name: str = "kqsvd"
    group_tokens: int = 1

    def roundtrip(self, layer, key, value, positions):
        """See CacheCodec.roundtrip."""
        codec = self.layers.get(layer)
        if codec is None:
            return None
        turn, out = codec.rope_block, []
        start = block_start(positions, turn) if turn else None
        for x, side in ((key, codec.k), (value, codec.v)):
            turned = turn and side is codec.k
            framed = rotate(x.to(side.encode.dtype), -start, codec.rope) if turned else x
            coded = reference.decode(*reference.encode(framed, positions, side), positions, side)
            out.append((rotate(coded, start, codec.rope) if turned else coded).to(x.dtype))
        return out[0], out[1]


@dataclass(frozen=True)
class ReadRule:
    """Which positions a query reads exactly.

    `window` W: the last W positions of a step's first query, rounded down to a tile of 16, as serving does; 0:
    every token, the query's own included, is read coded. `sinks`: exact first positions. `chunk`: query rows per step
    (1: decoding). `prefill`: leading positions computed in one step, hence exactly; 0: steps from the start.
    """

    window: int = 64
    sinks: int = 0
    chunk: int = 1
    prefill: int = 0

    def first_exact(self, positions: torch.Tensor, group_tokens: int = 1) -> torch.Tensor:
        """First exactly read position of every query position [T] int64."""
        step = self.prefill + (positions - self.prefill).div(self.chunk, rounding_mode="floor") * self.chunk
        step = torch.where(positions < self.prefill, 0, step)
        if self.window:
            first = reference.window_start(step, self.window)
        else:
            first = torch.where(positions < self.prefill, 0, positions + 1)
        return torch.minimum(first, (positions + 1) // group_tokens * group_tokens)


@dataclass
class Window:
    """A stretch of held-out text: tokens [N] int64; the tokens after position `first_scored` are predicted."""

    tokens: torch.Tensor
    text: str
    first_scored: int


@dataclass
class Score:
    """Per predicted token, float64 [n]: KL(reference || codec), negative log-likelihoods, whether top-1 agrees."""

    kl: torch.Tensor
    nll: torch.Tensor
    nll_reference: torch.Tensor
    agree: torch.Tensor
    logit_error: dict[int, float] = field(default_factory=dict)  # layer -> relative logit error


class Reference:
    """The exact pass of one window: log-probabilities of the scored rows, keys and values of all layers."""

    def __init__(self, model, window: Window) -> None:
        self.window = window
        self.cache: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def handler(call: AttentionCall) -> torch.Tensor:
            self.cache[call.layer] = (call.key, call.value)
            return exact_attention(call)

        self.logprobs = _logprobs(model, handler, window, 0)


def score(model, window: Window, exact: Reference, codec: CacheCodec, rule: ReadRule) -> Score:
    """Run `window` reading the cache through `codec` by `rule`, and compare with `exact`."""
    scored = window.first_scored
    if rule.prefill not in (0, scored):
        raise ConfigError(f"prefill of {rule.prefill} asked for; it must be 0 or the first scored position {scored}")
    start = rule.prefill  # earlier rows are exact, hence the same as in the reference pass
    positions = torch.arange(start, window.tokens.numel(), device=exact.logprobs.device)
    errors: dict[int, float] = {}

    def handler(call: AttentionCall) -> torch.Tensor:
        key, value = (
            torch.cat((old[:start], new))
            for old, new in zip(exact.cache[call.layer], (call.key, call.value), strict=True)
        )
        where = torch.arange(key.shape[0], device=key.device)
        coded = codec.roundtrip(call.layer, key, value, where)
        first = rule.first_exact(positions, codec.group_tokens) if coded else torch.zeros_like(positions)
        coded_key, coded_value = coded or (key, value)
        if coded:
            rows = positions >= scored
            errors[call.layer] = logit_error(call.query[rows], positions[rows], key, coded_key, first[rows], rule.sinks)
        return mixed_attention(call, CodedCache(key, value, coded_key, coded_value, first, rule.sinks), positions)

    return compare(
        exact.logprobs,
        _logprobs(model, handler, window, start),
        window.tokens[scored + 1 :],
        errors,
    )


def _logprobs(model, handler, window: Window, start: int) -> torch.Tensor:
    """Log-probabilities [n, vocabulary] float32 that predict the tokens after `first_scored`."""
    tokens = window.tokens[start:].to(model.device)
    with torch.inference_mode(), handle_attention(model, handler):
        out = model(
            tokens[None],
            position_ids=torch.arange(start, window.tokens.numel(), device=model.device)[None],
            use_cache=False,
            logits_to_keep=window.tokens.numel() - window.first_scored,
        )
    return out.logits[0, :-1].float().log_softmax(-1)


def compare(
    exact: torch.Tensor,
    coded: torch.Tensor,
    targets: torch.Tensor,
    errors: dict[int, float] | None = None,
) -> Score:
    """Score of log-probabilities `coded` against `exact`, both [n, vocabulary]; targets [n]."""
    targets = targets.to(exact.device)[:, None]
    pieces = zip(exact.split(64), coded.split(64), strict=True)
    kl = torch.cat([(e.exp() * (e - c)).double().sum(-1) for e, c in pieces])
    return Score(
        kl.cpu(),
        -coded.gather(1, targets)[:, 0].double().cpu(),
        -exact.gather(1, targets)[:, 0].double().cpu(),
        (coded.argmax(-1) == exact.argmax(-1)).double().cpu(),
        errors or {},
    )


def logit_error(
    query: torch.Tensor,
    positions: torch.Tensor,
    key: torch.Tensor,
    coded_key: torch.Tensor,
    first_exact: torch.Tensor,
    sinks: int = 0,
) -> float:
    """Root of sum (logit error)^2 / sum logit^2 over the coded keys of a sample of the queries.

    Both are centred per query: a constant added to all logits of a query leaves its attention unchanged. The
    first tile is left out: a sink's logits would dominate the denominator.
    """
    rows = slice(None, None, LOGIT_ROWS)
    query, first = query[rows], first_exact[rows]
    heads = key.shape[1]
    q = query.view(query.shape[0], heads, -1, query.shape[-1]).float()
    column = torch.arange(key.shape[0], device=key.device)
    seen = (column < first[:, None]) & (column <= positions[rows][:, None]) & (column >= max(sinks, TILE))
    seen = seen[:, None, None]
    count = seen.sum(-1, keepdim=True).clamp_min(1)
    total = []
    for k in (key.float() - coded_key.float(), key.float()):
        logit = torch.einsum("thgd,nhd->thgn", q, k) * seen
        total.append(((logit - logit.sum(-1, keepdim=True) / count) * seen).square().sum().double())
    return float((total[0] / total[1].clamp_min(1e-30)).sqrt())


def run_windows(
    model, windows: Iterable[Window], settings: Mapping[str, tuple[CacheCodec, ReadRule]]
) -> Iterator[tuple[Window, str, Score]]:
    """Scores of every setting on every window; the reference pass of a window is shared and then dropped."""
    for window in windows:
        exact = Reference(model, window)
        for name, (codec, rule) in settings.items():
            yield window, name, score(model, window, exact, codec, rule)
