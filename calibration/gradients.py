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


STRIP = 64  # query rows worked on at once: what they see of the past stays near the core


def _logits(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, scale: float, soft_cap: float, first: int = 0
) -> torch.Tensor:
    """Masked logits of KV heads: q [H, g, n, d] standing at `first`, k [H, t, d] from position 0 -> [H, g, n, t]."""
    heads, group, rows, _ = q.shape
    s = torch.bmm((q * scale).flatten(1, 2), k.mT).view(heads, group, rows, -1)
    if soft_cap:
        s = soft_cap * torch.tanh(s / soft_cap)
    if mask is None:  # only the rows' own positions hold some of the future
        own = s[..., first:]
        future = torch.ones(own.shape[-2:], dtype=torch.bool, device=q.device).triu_(1)
        own.masked_fill_(future, float("-inf"))
        return s
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
    k, v = k.contiguous(), v.contiguous()
    q, grad = (x.unflatten(0, (heads, -1)) for x in (q, grad))
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk_near, dv_near, dk_far, dv_far = (torch.zeros_like(k) for _ in range(4))
    for start in range(0, length, STRIP):
        end = min(start + STRIP, length)
        seen = end if mask is None else length
        queries, out = q[:, :, start:end], grad[:, :, start:end]
        s = _logits(queries, k[:, :seen], None if mask is None else mask[start:end], scale, soft_cap, start)
        queries, out = queries.flatten(1, 2), out.flatten(1, 2)
        p = s.softmax(-1).flatten(1, 2)
        ds = torch.bmm(out, v[:, :seen].mT)
        ds.sub_((p * ds).sum(-1, keepdim=True)).mul_(p)
        if soft_cap:
            ds.mul_(1 - (s.flatten(1, 2).masked_fill(p == 0, 0.0) / soft_cap).square())
        queries = queries * scale
        dq[:, :, start:end] = torch.bmm(ds, k[:, :seen]).mul_(scale).view_as(dq[:, :, start:end])
        # Columns before `mixed` are far from every query of the strip, those from `near` on from none.
        mixed, near = max(0, start - window + 1), max(0, end - window)
        at = torch.arange(start, end, device=q.device)[:, None] - torch.arange(mixed, near, device=q.device)
        far = (at >= window).to(q.dtype).repeat(q.shape[1], 1)
        for weights, x, close, distant in ((ds, queries, dk_near, dk_far), (p, out, dv_near, dv_far)):
            if mixed:
                distant[:, :mixed].baddbmm_(weights[..., :mixed].mT, x)
            if mixed < near:
                part = weights[..., mixed:near] * far
                distant[:, mixed:near].baddbmm_(part.mT, x)
                weights[..., mixed:near].sub_(part)
            close[:, mixed:seen].baddbmm_(weights[..., mixed:].mT, x)
    return dq.flatten(0, 1), dk_near + dk_far, dv_near + dv_far, dk_far, dv_far


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
    for h in range(k.shape[0]):  # one head at a time: all logits of a window are large
        rows = slice(h * group, (h + 1) * group)
        out[rows] = torch.matmul(_logits(q[None, rows], k[h : h + 1], mask, scale, soft_cap).softmax(-1)[0], v[h])
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
