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


def _logits(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, scale: float, soft_cap: float) -> torch.Tensor:
    """Masked logits of one KV head: q [g, T, d], k [T, d] -> [g, T, T]."""
    s = torch.matmul(q, k.T) * scale
    if soft_cap:
        s = soft_cap * torch.tanh(s / soft_cap)
    if mask is None:
        t = q.shape[-2]
        return s.masked_fill_(torch.ones(t, t, dtype=torch.bool, device=q.device).triu_(1), float("-inf"))
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
    at = torch.arange(length, device=q.device)
    far = (at[:, None] - at[None, :] >= window).to(q.dtype)
    dq, dk, dv, dk_far, dv_far = (torch.empty_like(x) for x in (q, k, v, k, v))
    for h in range(heads):  # one KV head at a time bounds memory to g T^2
        rows = slice(h * group, (h + 1) * group)
        s = _logits(q[rows], k[h], mask, scale, soft_cap)
        p = s.softmax(-1)
        dp = torch.matmul(grad[rows], v[h].T)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True))
        if soft_cap:
            ds = ds * (1 - (s.masked_fill(p == 0, 0.0) / soft_cap).square())
        ds = ds * scale
        dq[rows] = torch.matmul(ds, k[h])
        dk[h] = torch.einsum("gnt,gnd->td", ds, q[rows])
        dv[h] = torch.einsum("gnt,gnd->td", p, grad[rows])
        dk_far[h] = torch.einsum("gnt,gnd->td", ds.mul_(far), q[rows])
        dv_far[h] = torch.einsum("gnt,gnd->td", p.mul_(far), grad[rows])
    return dq, dk, dv, dk_far, dv_far


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
        group = q.shape[0] // k.shape[0]
        out = torch.empty_like(q)
        for h in range(k.shape[0]):
            rows = slice(h * group, (h + 1) * group)
            out[rows] = torch.matmul(_logits(q[rows], k[h], mask, scale, soft_cap).softmax(-1), v[h])
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """Whole gradients to autograd, far gradients to the callback."""
        q, k, v, *rest = ctx.saved_tensors
        scale, soft_cap, window, callback = ctx.options
        mask = rest[0] if rest else None
        dq, dk, dv, dk_far, dv_far = attention_gradients(q, k, v, grad, mask, scale, soft_cap, window)
        callback(dk_far, dv_far)
        return dq, dk, dv, None, None, None, None, None
