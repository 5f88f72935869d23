# SPDX-License-Identifier: Apache-2.0
"""What benchmarks/papers.py measures, on made-up tensors where the theory says what must come out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.papers import Layer, equal_rank, few_bits, rank_at
from benchmarks.papers_coders import SVDQ_SCHEDULES, per_channel, svdq
from benchmarks.papers_plot import plot
from vllm_kqsvd.calibration.model_probe import NO_ROPE


def made_up_layer(seed: int) -> Layer:
    """Four query heads on two KV heads of 32 channels with decaying, unaligned spectra; 200 tokens."""
    gen = torch.Generator().manual_seed(seed)
    shapes = torch.Generator().manual_seed(0)

    def draw(heads: int) -> torch.Tensor:
        mix = torch.randn(heads, 32, 32, generator=shapes, dtype=torch.float64) * 0.8 ** torch.arange(32)[:, None]
        return torch.randn(heads, 200, 32, generator=gen, dtype=torch.float64) @ mix

    q, k, v = draw(4), draw(2), draw(2)
    weight = torch.randn(4, 32, 64, generator=shapes, dtype=torch.float64)
    info = SimpleNamespace(group=2, scale=0.02, rope=NO_ROPE, output_weight=lambda: weight)
    return Layer(info, q, k, v, k)


def test_kqsvd_is_best_at_equal_rank_and_ignores_the_balance() -> None:
    rows = list(equal_rank(made_up_layer(1), made_up_layer(2), 0))
    error = {(experiment, method, setting.split()[0], metric): v for experiment, _, method, setting, metric, v in rows}
    for other in ("ksvd", "eigen"):
        best = error["equal rank", "kqsvd", "rank", "QK^T fitted"]
        assert 0 < best <= error["equal rank", other, "rank", "QK^T fitted"]
    by_alpha = {(m, s): v for e, _, m, s, _, v in rows if e == "unbalance"}
    assert by_alpha["kqsvd", "alpha 10"] == pytest.approx(by_alpha["kqsvd", "alpha 1"], rel=1e-4)
    assert by_alpha["eigen", "alpha 10"] == pytest.approx(
        by_alpha["ksvd", "alpha 10"], rel=0.1
    )  # keys drown the queries


def test_rank_reaches_the_error() -> None:
    k = made_up_layer(1).k
    moment, rank = k.mT @ k, rank_at(k.mT @ k)
    u = torch.linalg.eigh(moment)[1].flip(-1)

    def error(r: int) -> float:
        left = k - k @ u[..., :r] @ u[..., :r].mT
        return float((left.square().sum((1, 2)) / k.square().sum((1, 2))).sqrt().mean())

    assert error(rank) <= 0.1 < error(rank - 1)


def test_bits_are_those_asked_for() -> None:
    k = made_up_layer(1).k
    for bits, schedule in SVDQ_SCHEDULES.items():
        assert sum(schedule) / 8 == bits
        levels = [per_channel(k, bits)[h, :, c].unique().numel() for h in range(2) for c in range(32)]
        assert sum(torch.tensor(levels).log2().round()) == 64 * bits
        assert (svdq(k, bits) - k).norm() < (per_channel(k, bits) - k).norm()


def test_rows_become_a_plot(tmp_path: Path) -> None:
    rows = [
        *equal_rank(made_up_layer(1), made_up_layer(2), 0),
        *few_bits(made_up_layer(2), 0, {"2 bits": made_up_layer(2).k}),
    ]
    plot(rows, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000
