# SPDX-License-Identifier: Apache-2.0
"""Attention with its backward pass written out, to see the gradients of keys and values *as coded tokens are read*.

The last W tokens of a sequence are attended exactly, so only queries at least W positions later ever see the coded
key. Metrics must therefore leave the nearer queries out; plain autograd cannot, because upstream layers need the
whole gradient. The backward pass here returns the whole gradient and hands the far part to a callback.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

GradientCallback = Callable[[torch.Tensor, torch.Tensor], None]


STRIP = 128  # query rows worked on at once: what they see of the past fits a core's cache


def _logits(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, scale: float, soft_cap: float, first: int = 0
) -> torch.Tensor:
    """Masked logits of one KV head: q [g, n, d] standing at `first`, k [t, d] from position 0 -> [g, n, t]."""
    s = torch.matmul(q, k.T) * scale
    if soft_cap:
        s = soft_cap * torch.tanh(s / soft_cap)
    if mask is None:
        future = torch.ones(s.shape[-2:], dtype=torch.bool, device=q.device).triu_(first + 1)
        return s.masked_fill_(future, float("-inf"))
    return s.masked_fill_(~mask, float("-inf")) if mask.dtype == torch.bool else s + mask


def attention_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    soft_cap: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of sum(attention(q, k, v) * grad): dq, dk, dv, and the parts of dk, dv through queries at least
    `window` positions later.

    q, grad [Hq, T, d]; k, v [H, T, d]; mask [T, T] bool (True: attend) or additive, None: causal.
    """
    heads, length = k.shape[0], k.shape[1]
    group = q.shape[0] // heads
    dq = torch.empty_like(q)
    dk, dv, dk_far, dv_far = (torch.zeros_like(x) for x in (k, v, k, v))
    for h in range(heads):
        rows = slice(h * group, (h + 1) * group)
        for start in range(0, length, STRIP):
            end = min(start + STRIP, length)
            seen = end if mask is None else length
            queries, out = q[rows, start:end], grad[rows, start:end]
            s = _logits(queries, k[h, :seen], None if mask is None else mask[start:end], scale, soft_cap, start)
            p = s.softmax(-1)
            ds = torch.matmul(out, v[h, :seen].T)
            ds.sub_((p * ds).sum(-1, keepdim=True)).mul_(p)
            if soft_cap:
                ds.mul_(1 - (s.masked_fill(p == 0, 0.0) / soft_cap).square())
            ds.mul_(scale)
            dq[rows, start:end] = torch.matmul(ds, k[h, :seen])
            # Columns before `mixed` are far from every query of the strip, later ones from some.
            mixed = max(0, start - window + 1)
            at = torch.arange(start, end, device=q.device)[:, None] - torch.arange(mixed, seen, device=q.device)
            far = (at >= window).to(q.dtype)
            for weights, x, whole, distant in ((ds, queries, dk, dk_far), (p, out, dv, dv_far)):
                part = _to_keys(weights, x)
                whole[h, :seen] += part
                distant[h, :mixed] += part[:mixed]
                distant[h, mixed:seen] += _to_keys(weights[..., mixed:] * far, x)
    return dq, dk, dv, dk_far, dv_far


def _to_keys(weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """sum over a group's heads and queries: weights [g, n, t], x [g, n, d] -> [t, d]."""
    return weights.flatten(0, 1).T @ x.reshape(-1, x.shape[-1])


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float, soft_cap: float
) -> torch.Tensor:
    """Attention of one sequence, [Hq, T, d]."""
    group = q.shape[0] // k.shape[0]
    if not soft_cap:
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        return torch.nn.functional.scaled_dot_product_attention(
            q[None], k[None], v[None], mask, is_causal=mask is None, scale=scale
        )[0]
    out = torch.empty_like(q)
    for h in range(k.shape[0]):
        rows = slice(h * group, (h + 1) * group)
        out[rows] = torch.matmul(_logits(q[rows], k[h], mask, scale, soft_cap).softmax(-1), v[h])
    return out


class FarAttention(torch.autograd.Function):
    """Causal attention of one sequence; its backward pass reports the far gradients of K and V to a callback."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        soft_cap: float,
        window: int,
        callback: GradientCallback,
    ) -> torch.Tensor:
        """q [Hq, T, d], k and v [H, T, d] -> [Hq, T, d]."""
        ctx.save_for_backward(q, k, v, *(() if mask is None else (mask,)))
        ctx.options = (scale, soft_cap, window, callback)
        return _attention(q, k, v, mask, scale, soft_cap)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """Whole gradients to autograd, far gradients to the callback."""
        q, k, v, *rest = ctx.saved_tensors
        scale, soft_cap, window, callback = ctx.options
        mask = rest[0] if rest else None
        dq, dk, dv, dk_far, dv_far = attention_gradients(q, k, v, grad, mask, scale, soft_cap, window)
        callback(dk_far, dv_far)
        return dq, dk, dv, None, None, None, None, None
