# SPDX-License-Identifier: Apache-2.0
"""Turning back by a block start equals RoPE by the in-block offset, for every rotary style."""

from __future__ import annotations

import pytest
import torch

from vllm_kqsvd.ops.rope_block import RopeSpec, block_start, block_start_table, rotate


@pytest.mark.parametrize("rotary_dim", [0, 32, 64])
@pytest.mark.parametrize("interleaved", [False, True])
def test_turning_back_leaves_the_offset(rotary_dim, interleaved):
    freq = 1e4 ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / max(rotary_dim, 1))
    rope = RopeSpec(freq, interleaved)
    x = torch.randn(5, 3, 64, dtype=torch.float64)
    pos = torch.tensor([0, 31, 32, 1000, 131071])
    back = rotate(rotate(x, pos, rope), -block_start(pos, 32), rope)
    assert torch.allclose(back, rotate(x, pos % 32, rope), atol=1e-9)


def test_logits_do_not_change():
    rope = RopeSpec(1e4 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64))
    q, k = torch.randn(2, 1, 1, 64, dtype=torch.float64)
    start = -block_start(torch.tensor([777]), 64)
    turned = (rotate(q[None, 0], start, rope) * rotate(k[None, 0], start, rope)).sum()
    assert torch.allclose(turned, (q * k).sum())


def test_table_holds_the_block_starts():
    rope = RopeSpec(1e4 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64))
    table = block_start_table(rope, 32, 5000)
    angle = 4999 * 32 * rope.inv_freq
    assert torch.allclose(table[4999], torch.stack((angle.cos(), angle.sin()), -1).float())
