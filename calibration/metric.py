# SPDX-License-Identifier: Apache-2.0
"""Metrics M: what an error e of a key or value costs is e^T M e. Every metric is [H, d, d] float64, per KV head.

`kq`: squared logit error for K (Gram of the queries, KQ-SVD, arXiv 2512.05916, group stacked), squared error after the
output projection for V. `fisher`: second-order KL of the model's output (Gram of dL/dk, dL/dv, labels drawn from the
model). `mix`: Fisher plus half the trace-matched kq, which regularizes it.
"""

from __future__ import annotations

import torch

from vllm_kqsvd.calibration.frames import Frame, distance_law, rotation_average
from vllm_kqsvd.calibration.model_probe import LayerInfo
from vllm_kqsvd.calibration.statistics import LayerStatistics
from vllm_kqsvd.errors import CalibrationError

METRICS = ("kq", "fisher", "mix")
MIX = 0.5  # weight of the trace-matched kq metric in `mix`
RIDGE = 1e-4  # of the mean eigenvalue, added before any root


def trace(m: torch.Tensor) -> torch.Tensor:
    """Trace of m [..., d, d] as [..., 1, 1]."""
    return m.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def with_ridge(m: torch.Tensor, ridge: float = RIDGE) -> torch.Tensor:
    """m + ridge * (mean eigenvalue) * I, symmetrized."""
    eye = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)
    return (m + m.mT) / 2 + ridge * trace(m).clamp_min(1e-30) / m.shape[-1] * eye


def matrix_root(m: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(m^{1/2}, m^{-1/2}) of symmetric positive m [..., d, d]."""
    w, v = torch.linalg.eigh(m)
    w = w.clamp_min(w[..., -1:] * 1e-14)
    return v * w.sqrt()[..., None, :] @ v.mT, v * w.rsqrt()[..., None, :] @ v.mT


def kq_metric(
    side: str, stats: LayerStatistics, layer: LayerInfo, frame: Frame, window: int, context: int
) -> torch.Tensor:
    """K: E[R_m q q^T R_m^T] scaled as logits are, over the causal distances m >= window of a text of `context` tokens
    and over the frame's offsets. V: sum over the group of W_O W_O^T (identity if the projection is not found)."""
    if side == "k":
        gram = stats.query_gram().cpu() * layer.scale**2
        near = rotation_average(gram, layer.rope, distance_law(window, context))
        return frame.average(near)
    weight = layer.output_weight()
    if weight is None:
        return torch.eye(layer.head_dim, dtype=torch.float64).expand(layer.num_kv_heads, -1, -1).clone()
    stacked = weight.reshape(layer.num_kv_heads, layer.group, layer.head_dim, -1)
    return torch.einsum("hgdm,hgem->hde", stacked, stacked)


def fisher_metric(side: str, stats: LayerStatistics, frame: Frame) -> torch.Tensor | None:
    """Gradient Gram per token in the frame, or None if none was collected. V has no rotation."""
    gram = stats.gradient_gram(side)
    if gram is None:
        return None
    return frame.average(gram.cpu()) if side == "k" else gram.cpu()


def metric(
    kind: str, side: str, stats: LayerStatistics, layer: LayerInfo, frame: Frame, window: int = 64, context: int = 2048
) -> torch.Tensor:
    """The metric `kind` of one side, with ridge. Without gradients `mix` is `kq`; `fisher` raises CalibrationError."""
    fisher = fisher_metric(side, stats, frame)
    if kind not in METRICS:
        raise CalibrationError(f"metric {kind!r} asked for; choose one of {', '.join(METRICS)}")
    if kind == "fisher":
        if fisher is None:
            raise CalibrationError("the fisher metric needs gradients, and the statistics hold none")
        return with_ridge(fisher)
    kq = kq_metric(side, stats, layer, frame, window, context)
    if kind == "kq" or fisher is None:
        return with_ridge(kq)
    return with_ridge(fisher + MIX * trace(fisher) / trace(kq).clamp_min(1e-30) * kq)
