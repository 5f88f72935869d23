# SPDX-License-Identifier: Apache-2.0
"""Progressive layer ranks from the condition numbers of W_K and W_V (LoRC, arXiv 2410.03111).

An error of an early layer passes through all later ones, so early layers keep more. LoRC gives them more bytes as well;
here every layer has the same ones, because vLLM's block pool holds pages of one size (`attention/binding.py` refuses
others): a layer of lower rank spends its bytes on fewer channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_kqsvd.calibration.model_probe import LayerInfo
from vllm_kqsvd.errors import CalibrationError
from vllm_kqsvd.plan import GROUP

LEAST_SHARE = 0.5  # of head_dim that the layer with the smallest cumulative condition number keeps


def log_condition(weight: torch.Tensor) -> float:
    """Natural logarithm of the condition number of weight [H, d, hidden], all heads stacked."""
    s = torch.linalg.svdvals(weight.reshape(-1, weight.shape[-1]))
    return float((s[0] / s[-1].clamp_min(1e-12 * s[0])).log())


def ranks_from(conditions: Sequence[float], head_dim: int) -> list[int]:
    """Rank of every layer, a multiple of 16, from its log condition number.

    The cumulative condition number of a layer is the product from it to the last one; ranks fall linearly in its
    logarithm, from head_dim to LEAST_SHARE of it.
    """
    cumulative = torch.tensor(conditions, dtype=torch.float64).flip(0).cumsum(0).flip(0)
    spread = (cumulative.max() - cumulative.min()).clamp_min(1e-30)
    share = 1 - (cumulative.max() - cumulative) / spread * (1 - LEAST_SHARE)
    return [max(GROUP, -(-int(torch.ceil(s * head_dim - 1e-9)) // GROUP) * GROUP) for s in share]


def layer_ranks(layers: Sequence[LayerInfo]) -> list[int]:
    """The ranks of a model's layers. Raises CalibrationError without k_proj and v_proj weights."""
    conditions = []
    for layer in layers:
        weights = [layer.projection_weight(side) for side in ("k", "v")]
        if any(w is None for w in weights):
            raise CalibrationError("basis 'lorc' needs k_proj and v_proj weights of their own; choose another basis")
        conditions.append(sum(log_condition(w) for w in weights if w is not None))
    return ranks_from(conditions, layers[0].head_dim)
