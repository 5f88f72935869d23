# SPDX-License-Identifier: Apache-2.0
"""Sinks are found where they are a constant vector, wherever they stand, and nowhere else."""

from __future__ import annotations

import torch

from vllm_kqsvd.calibration.sinks import find_prototypes


def texts(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    x = 3 + torch.randn(16, 64, 2, 32, generator=gen, dtype=torch.float64)
    constant = torch.randn(32, generator=gen, dtype=torch.float64) * 0.2
    return x, constant


def test_prototype_of_a_constant_first_token() -> None:
    x, constant = texts()
    x[:, 0, 0] = constant + 0.01 * torch.randn(16, 32, dtype=torch.float64)
    x[3, 0, 0] = x[3, 5, 0]  # this text's sink stands at position 1
    x[3, 1, 0] = constant
    x[5, 7, 0] = constant  # and this one has two
    found = find_prototypes(x)
    assert (found.sink[0] - constant).norm() < 0.05
    assert torch.equal(found.sink[1], found.mean[1])
    classes = found.is_sink(x)
    assert classes[:, :, 0].sum() == 17
    assert classes[3, 1, 0]
    assert classes[5, 7, 0]
    assert not classes[..., 1].any()
    assert (found.mean[0] - 3).abs().max() < 0.2


def test_no_sinks_without_a_cluster() -> None:
    x, _ = texts()
    found = find_prototypes(x)
    assert torch.equal(found.sink, found.mean)
    assert not found.is_sink(x).any()
