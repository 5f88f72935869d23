# SPDX-License-Identifier: Apache-2.0
"""An orthogonal basis trained so that every prefix of it is good (MatryoshkaKV, arXiv 2410.14731).

The paper distils the model's output through projections truncated to ranks drawn at random. To second order that loss
is e^T M e with M the Fisher metric, which the statistics already hold, so here the expected loss of the whole schedule
of ranks is minimized without the model: a bounded number of Adam steps on the Cayley parameters of a rotation of the
principal axes. The best basis seen is kept, the start included, so that training never does worse than PCA on its loss.
"""

from __future__ import annotations

import torch

from vllm_kqsvd.plan import GROUP

STEPS = 100
_RATE = 0.01


def nested_loss(basis: torch.Tensor, covariance: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    """Error in the metric of what the first 16, 32, ... d - 16 columns of an orthogonal basis leave, summed: [H].

    What rank r leaves costs tr(M' S') over rows and columns from r on, with M' and S' both turned into the basis, so
    entry (i, j) counts once for every rank up to min(i, j).
    """
    s, m = (basis.mT @ x @ basis for x in (covariance, metric))
    left_out_by = torch.arange(basis.shape[-1], device=basis.device) // GROUP
    return (s * m * torch.minimum(left_out_by[:, None], left_out_by[None, :])).sum((-1, -2))


def train_nested(covariance: torch.Tensor, metric: torch.Tensor, steps: int = STEPS) -> torch.Tensor:
    """Orthogonal basis [H, d, d] of least nested loss found from the principal axes; covariance, metric [H, d, d].

    Deterministic. With d = 16 there is no prefix to train and the principal axes are returned.
    """
    start = torch.linalg.eigh(covariance)[1].flip(-1)
    eye = torch.eye(start.shape[-1], dtype=start.dtype)
    scale = nested_loss(start, covariance, metric).clamp_min(1e-300)
    best, best_loss = start.clone(), torch.ones_like(scale)
    free = torch.zeros_like(start, requires_grad=True)
    optimizer = torch.optim.Adam([free], lr=_RATE)
    with torch.enable_grad():
        for step in range(steps if start.shape[-1] > GROUP else 0):
            for group in optimizer.param_groups:
                group["lr"] = _RATE * (1 - step / steps)
            skew = free - free.mT
            basis = start @ torch.linalg.solve(eye + skew, eye - skew)
            loss = nested_loss(basis, covariance, metric) / scale
            found, value = basis.detach(), loss.detach()
            better = value < best_loss
            best = torch.where(better[:, None, None], found, best)
            best_loss = torch.where(better, value, best_loss)
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
    return best
