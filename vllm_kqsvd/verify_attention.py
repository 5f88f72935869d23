# SPDX-License-Identifier: Apache-2.0
"""Attention that reads part of its cache through a codec, for whole texts at once.

Serving decodes one token after another; each step reads old tokens from the compressed cache and recent
ones exactly. Teacher-forced, all these steps are one forward pass: score every query against the exact and
the coded keys, and keep of each the part that the step would have read. Not for serving.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from vllm_kqsvd.errors import UnsupportedError

ATTENTION_NAME = "kqsvd_verify"  # key in transformers' attention registry
ROWS = 512  # queries scored at once: bounds memory at long contexts


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention: query [T, Hq, d], key and value [T, H, d] after RoPE, and the layer's settings."""

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    soft_cap: float = 0.0
    sliding_window: int = 0  # visible positions; 0: all


@dataclass(frozen=True)
class CodedCache:
    """What a query may read: exact and coded key and value, all [N, H, d], and where the exact region begins.

    The query at row i reads positions below `first_exact[i]` [T] int64 coded, from there on exactly; the
    first `sinks` positions are always exact.
    """

    key: torch.Tensor
    value: torch.Tensor
    coded_key: torch.Tensor
    coded_value: torch.Tensor
    first_exact: torch.Tensor
    sinks: int = 0


def mixed_attention(call: AttentionCall, cache: CodedCache, positions: torch.Tensor) -> torch.Tensor:
    """Causal attention of call.query, standing at `positions` [T] (consecutive), over `cache`: [T, Hq, d]."""
    out = torch.empty_like(call.query)
    for at in range(0, positions.numel(), ROWS):
        rows = slice(at, at + ROWS)
        out[rows] = _attend_rows(call, cache, call.query[rows], positions[rows], cache.first_exact[rows])
    return out


def _attend_rows(
    call: AttentionCall,
    cache: CodedCache,
    query: torch.Tensor,
    positions: torch.Tensor,
    first: torch.Tensor,
) -> torch.Tensor:
    """`mixed_attention` of a few rows. Columns [0, low) are coded for every row; [low, end) differ by row."""
    end = int(positions[-1]) + 1
    low = max(int(first.min()), min(cache.sinks, end))
    heads = cache.key.shape[1]
    q = query.view(query.shape[0], heads, -1, query.shape[-1]).permute(1, 2, 0, 3)  # [H, g, T, d]
    old_key, old_value = cache.coded_key[:low], cache.coded_value[:low]
    if cache.sinks:
        sinks = min(cache.sinks, low)
        old_key = torch.cat((cache.key[:sinks], old_key[sinks:]))
        old_value = torch.cat((cache.value[:sinks], old_value[sinks:]))
    column = torch.arange(low, end, device=query.device)
    is_coded = column < first[:, None]

    def scores(key: torch.Tensor) -> torch.Tensor:
        return torch.matmul(q, key.permute(1, 2, 0).unsqueeze(1)) * call.scale

    recent = torch.where(is_coded, scores(cache.coded_key[low:end]), scores(cache.key[low:end]))
    score = torch.cat((scores(old_key), recent), -1)
    if call.soft_cap:
        score = call.soft_cap * torch.tanh(score / call.soft_cap)
    every = torch.arange(end, device=query.device)
    hidden = every > positions[:, None]
    if call.sliding_window:
        hidden |= every <= positions[:, None] - call.sliding_window
    p = score.masked_fill_(hidden, float("-inf")).softmax(-1)

    def weighted(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.matmul(weight, value.transpose(0, 1).unsqueeze(1))

    coded = p[..., low:] * is_coded
    out = weighted(p[..., :low], old_value)
    out += weighted(coded, cache.coded_value[low:end]) + weighted(p[..., low:] - coded, cache.value[low:end])
    return out.permute(2, 0, 1, 3).reshape(query.shape)


def exact_attention(call: AttentionCall) -> torch.Tensor:
    """Plain causal attention of a whole text: [T, Hq, d]."""
    if call.soft_cap or call.sliding_window:
        rows = torch.arange(call.query.shape[0], device=call.query.device)
        nothing = torch.zeros_like(rows)
        cache = CodedCache(call.key, call.value, call.key, call.value, nothing)
        return mixed_attention(call, cache, rows)
    q, k, v = (x.transpose(0, 1)[None] for x in (call.query, call.key, call.value))
    group = q.shape[1] // k.shape[1]  # repeated by hand: float32 GQA has no memory-saving kernel on GPUs
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=call.scale)
    return out[0].transpose(0, 1)


_handler: ContextVar[Callable[[AttentionCall], torch.Tensor]] = ContextVar("kqsvd_verify_handler")


def _registered(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """The function in transformers' registry: one sequence, whatever `handle_attention` installed."""
    if query.shape[0] != 1 or attention_mask is not None:
        raise UnsupportedError("verify runs one unpadded text at a time; found a batch or an attention mask")
    if kwargs.get("s_aux") is not None:
        raise UnsupportedError(f"{type(module).__name__} has learned attention sinks, which are not supported")
    call = AttentionCall(
        int(module.layer_idx),
        *(x[0].transpose(0, 1) for x in (query, key, value)),
        scale=float(scaling if scaling is not None else query.shape[-1] ** -0.5),
        soft_cap=float(kwargs.get("softcap") or 0.0),
        sliding_window=int(kwargs.get("sliding_window") or 0),
    )
    return _handler.get()(call)[None], None


@contextmanager
def handle_attention(model, handler: Callable[[AttentionCall], torch.Tensor]) -> Iterator[None]:
    """Within the block, every attention layer of the Hugging Face `model` computes `handler(call)`."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, _registered)
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION_NAME)
    if model.config._attn_implementation != ATTENTION_NAME:
        raise UnsupportedError(
            f"{type(model).__name__} does not take its attention from transformers' AttentionInterface"
        )
    token = _handler.set(handler)
    try:
        yield
    finally:
        _handler.reset(token)
        model.set_attn_implementation(before)
