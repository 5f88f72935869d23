# SPDX-License-Identifier: Apache-2.0
"""Offline calibration of a decoder: codes are turned back by least squares instead of by the inverse.

ReCalKV (arXiv 2505.24357) refits the reconstruction of values to calibration data once the transform is fixed. Here the
same closed form sees the codes themselves. The error behind any output projection of full rank has the same minimum,
since the decoder's columns are free.
"""

from __future__ import annotations

import torch

RIDGE = 1e-3  # of the mean energy of a latent, pulling towards the decoder that is refitted


def refit_decoder(coded: torch.Tensor, target: torch.Tensor, decode: torch.Tensor) -> torch.Tensor:
    """argmin_D sum_n |target_n - coded_n D|^2 + ridge |D - decode|^2 per head, float64.

    coded [n, H, R]: latents as they come back from their codes; target [n, H, d]: tokens minus mean; decode [H, R, d].
    """
    u, x, start = coded.double(), target.double(), decode.double()
    gram = torch.einsum("nhr,nhs->hrs", u, u)
    cross = torch.einsum("nhr,nhd->hrd", u, x)
    weight = RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)[:, None, None]
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + weight * eye, cross + weight * start)
