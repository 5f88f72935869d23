# SPDX-License-Identifier: Apache-2.0
"""The re-implemented peer formats: known figures, ranges, causality."""

from __future__ import annotations

import pytest
import torch

from benchmarks import peers
from benchmarks.fidelity import peer_codecs
from benchmarks.fidelity_plot import family, selected
from benchmarks.peers.base import hadamard, round_min_max
from benchmarks.peers.lloyd_max import gaussian_levels
from tests.helpers import random_codec, side_plan
from vllm_kqsvd.ops.rope_block import rotate
from vllm_kqsvd.plan import LayerPlan

# mean squared error of the optimal quantizer of N(0, 1) with 2^b levels (Max 1960, table I)
MAX_1960 = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}


@pytest.mark.parametrize("num_bits", MAX_1960)
def test_lloyd_max_reaches_the_published_distortion(num_bits):
    x = torch.special.ndtri((torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000)
    levels = gaussian_levels(num_bits).double()
    error = x - levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]
    assert float(error.square().mean()) == pytest.approx(MAX_1960[num_bits], rel=0.01)


@pytest.mark.parametrize("dim", [16, 64, 96, 128])
def test_hadamard_is_orthonormal(dim):
    h = hadamard(dim)
    assert torch.allclose(h @ h.T, torch.eye(dim), atol=1e-6)


@pytest.mark.parametrize("name,bits,error", [
    ("fp8", 8.0, 0.03), ("int4_per_token_head", 4.5, 0.12), ("kivi-4-g32", 5.0, 0.10), ("nvfp4", 4.5, 0.12),
    ("turboquant-like-4", 4.25, 0.10), ("turboquant-like-3", 3.25, 0.19),
])  # fmt: skip
def test_error_on_gaussian_data_is_what_the_bits_allow(name, bits, error):
    codec = peer_codecs(30, None)[name]
    x = torch.randn(64, 2, 64, generator=torch.Generator().manual_seed(0))
    key, value = codec.roundtrip(5, x, 2 * x, torch.arange(64))
    assert codec.bits(64) == bits
    assert 0.3 * error < float((key - x).norm() / x.norm()) < error
    assert float((value - 2 * x).norm() / (2 * x).norm()) < error


def test_turboquant_as_shipped_skips_boundary_layers():
    codec = peer_codecs(30, None)["turboquant_4bit_nc"]
    x = torch.randn(8, 2, 64)
    assert [i for i in range(30) if codec.roundtrip(i, x, x, torch.arange(8)) is None] == [0, 1, 28, 29]
    assert codec.bits(64) == pytest.approx((4 * 16 + 26 * 4.375) / 30)
    assert peers.boundary_layers(2) == {0, 1}


def test_kivi_leaves_an_incomplete_group_exact_and_every_token_alone_otherwise():
    codec = peers.KiviCodec(4)
    x = torch.randn(50, 2, 64)
    key, _ = codec.roundtrip(0, x, x, torch.arange(50))
    assert torch.equal(key[32:], x[32:]) and not torch.equal(key[:32], x[:32])


def test_centred_codec_takes_the_rotated_mean_away():
    ours = random_codec(LayerPlan(side_plan(4, 2, 2), side_plan(4, 4, 2, 2)), 2, 64, rope_block=32)
    codec = peers.CentredCodec(peers.RotatedLloydMaxCodec(2), {0: ours})
    positions = torch.arange(100)
    mean = (ours.k.mean_basis[0] @ ours.k.mean)[None].expand(100, -1, -1)  # at offset 0: the mean before RoPE
    key = rotate(50 * mean, positions, ours.rope)
    small = peers.CentredCodec(peers.RotatedLloydMaxCodec(2), {0: ours}).roundtrip
    mean_only = rotate(mean, positions, ours.rope)
    coded, value = small(0, mean_only, torch.zeros(100, 2, 64), positions)
    assert torch.allclose(coded, mean_only, atol=2e-2)
    assert not torch.allclose(codec.roundtrip(0, key, key, positions)[0], key, atol=0.1)
    assert codec.roundtrip(1, key, key, positions) is None


def test_min_max_rounding_hits_both_extremes():
    x = torch.tensor([[-1.0, 0.1, 2.0]])
    out = round_min_max(x, 2, -1)
    assert torch.allclose(out[0, [0, 2]], x[0, [0, 2]], atol=1e-3)


def test_plot_families_join_bit_widths():
    names = ["fp8", "nvfp4", "kivi-4-g32", "turboquant_3bit_nc", "turboquant_4bit_nc-all-layers", "centred-like-2"]
    joined = ["fp8", "nvfp4", "kivi", "turboquant", "turboquant-all-layers", "centred-like"]
    assert [family({"method": name, "sinks": "4"}) for name in names] == joined
    assert family({"method": "kqsvd-smollm2-2.5bit", "sinks": "class"}) == "vllm_kqsvd"
    assert family({"method": "model-4bit-catalogue", "sinks": "class"}) == "vllm_kqsvd (compiled plans)"


def test_plot_leaves_chats_and_served_rows_out():
    row = {"method": "fp8", "text": "essays", "model": "m", "context": "2048"}
    assert selected(row, "m", 2048)
    for other in ({"method": "fp8 (vLLM)"}, {"text": "essays (chat)"}, {"model": "n"}, {"method": "bf16"}):
        assert not selected({**row, **other}, "m", 2048)
