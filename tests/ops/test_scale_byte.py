# SPDX-License-Identifier: Apache-2.0
"""The scale byte: every value survives, rounding is to the nearest, the class bit is independent."""

from __future__ import annotations

import torch

from vllm_kqsvd.ops.scale_byte import MAX_SCALE, MIN_SCALE, decode_scale, encode_scale


def test_every_byte_survives():
    byte = torch.arange(256, dtype=torch.uint8)
    scale, is_sink = decode_scale(byte)
    assert torch.equal(encode_scale(scale, is_sink), byte)
    assert scale[0] == MIN_SCALE and scale[127] == MAX_SCALE
    e, m = byte[:128].long() // 8, byte[:128].long() % 8
    assert torch.equal(scale[:128], 2.0 ** (e - 8) * (1 + m / 8))


def test_rounds_to_the_nearest_value():
    x = torch.rand(5000, dtype=torch.float64).mul(20).sub(9).exp2()
    got = decode_scale(encode_scale(x, torch.zeros(5000, dtype=torch.bool)))[0].double()
    table = decode_scale(torch.arange(128, dtype=torch.uint8))[0].double()
    best = (table - x[:, None]).abs().amin(1)
    assert ((got - x).abs() <= best * (1 + 1e-6) + 1e-9).all()
