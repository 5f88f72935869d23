# SPDX-License-Identifier: Apache-2.0
"""The written-out backward pass equals autograd, and its far part equals autograd through far queries alone."""

from __future__ import annotations

import pytest
import torch

from vllm_kqsvd.calibration.gradients import FarAttention, attention_gradients


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, near: torch.Tensor, cap: float) -> torch.Tensor:
    """Attention whose near logits and values come from detached copies: gradients of k, v are the far ones."""
    group = q.shape[0] // k.shape[0]
    k, v = (x.repeat_interleave(group, 0) for x in (k, v))
    s = torch.where(near, q @ k.detach().mT, q @ k.mT) * 0.3
    s = cap * torch.tanh(s / cap) if cap else s
    causal = torch.ones(s.shape[-2:], dtype=torch.bool).tril()
    p = s.masked_fill(~causal, float("-inf")).softmax(-1)
    return p.masked_fill(near, 0) @ v + p.masked_fill(~near, 0) @ v.detach()


@pytest.mark.parametrize("cap", [0.0, 2.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("strip", [5, 128])
def test_gradients_equal_autograd(cap: float, masked: bool, strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_kqsvd.calibration.gradients.STRIP", strip)
    gen = torch.Generator().manual_seed(1)
    q, k, v, grad = (torch.randn(h, 12, 8, generator=gen, dtype=torch.float64) for h in (4, 2, 2, 4))
    mask = torch.ones(12, 12, dtype=torch.bool).tril() if masked else None
    at = torch.arange(12)
    near = at[:, None] - at[None, :] < 4
    found = []
    for where in (torch.zeros_like(near), near):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        (plain(*leaves, where, cap) * grad).sum().backward()
        found.append([x.grad for x in leaves])
    dq, dk, dv, dk_far, dv_far = attention_gradients(q, k, v, grad, mask, 0.3, cap, 4)
    for got, want in zip((dq, dk, dv, dk_far, dv_far), (*found[0], *found[1][1:]), strict=True):
        assert torch.allclose(got, want, atol=1e-12)
    seen = []
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = FarAttention.apply(*leaves, mask, 0.3, cap, 4, lambda a, b: seen.append((a, b)))
    assert torch.allclose(out, plain(q, k, v, near, cap))
    (out * grad).sum().backward()
    assert torch.allclose(leaves[1].grad, dk)
    assert torch.allclose(seen[0][0], dk_far)
    assert torch.allclose(seen[0][1], dv_far)
