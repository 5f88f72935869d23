# SPDX-License-Identifier: Apache-2.0
"""Bases of latent space: every known method is one linear transform here and writes the same file.

| name | transform | source |
| --- | --- | --- |
| `mix`, `fisher`, `kq` | Karhunen-Loeve transform in that metric | KQ-SVD (arXiv 2512.05916) is `kq` |
| `ksvd` | principal axes of the data | SVDq (2502.15304), Eigen-free K-SVD |
| `eigen` | principal axes of keys and queries together | Eigen Attention (2408.05646) |
| `weight_svd` | principal axes of W_K, W_V: no data | LoRC's basis (2410.03111) |
| `lorc` | the same, with fewer channels the later the layer (progressive.py) | LoRC |
| `recalkv` | K: principal axes per group of similar heads (CKA); V: `ksvd`, decoder refitted | ReCalKV (2505.24357) |
| `head_merge` | heads turned onto each other, then one mean and `ksvd` per pair | aligned merging (2412.20677) |
| `matryoshka` | orthogonal, trained so that every prefix is good; nested | MatryoshkaKV (2410.14731) |
| `channel_prune` | channels sorted by query-weighted energy | ThinK (2407.21018) |
| `hadamard` | random signs, then Hadamard | no data, as DecoQuant (2405.12591) or TurboQuant's rotation |
| `identity` | none | |

All of them are coded by the same quantizer with the same choice of bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from vllm_kqsvd.calibration.head_groups import Sharing
from vllm_kqsvd.calibration.matryoshka import train_nested
from vllm_kqsvd.calibration.metric import matrix_root
from vllm_kqsvd.errors import CalibrationError

METHODS = ("weight_svd", "lorc", "recalkv", "head_merge", "matryoshka", "channel_prune", "hadamard", "identity")
BASES = ("mix", "fisher", "kq", "ksvd", "eigen", *METHODS)
NESTED = ("matryoshka",)  # always solved in nested order
_OWN_ORDER = ("lorc", "matryoshka")  # channels stay as the method orders them, whatever their energy


@dataclass(frozen=True)
class Basis:
    """encode [H, d, d], decode [H, d, d] (encode @ decode = I); channels by weighted variance, falling, unless the
    method has an order of its own.

    variance [H, d]: of every latent channel; weight [H, d]: cost of a unit error in it, in the reference metric;
    owner: for every head, the head whose random rotations it shares (itself, unless bases are shared).
    """

    encode: torch.Tensor
    decode: torch.Tensor
    variance: torch.Tensor
    weight: torch.Tensor
    owner: tuple[int, ...]

    def first(self, rank: int) -> Basis:
        """The first `rank` channels alone."""
        return replace(
            self,
            encode=self.encode[..., :rank],
            decode=self.decode[:, :rank],
            variance=self.variance[:, :rank],
            weight=self.weight[:, :rank],
        )

    def truncated(self, rank: int) -> Basis:
        """The same with nothing in the channels from `rank` on: they are zero and cost nothing."""
        kept = (torch.arange(self.encode.shape[-1]) < rank).to(self.encode)
        return replace(
            self, encode=self.encode * kept, decode=self.decode * kept[:, None], variance=self.variance * kept
        )


def klt(covariance: torch.Tensor, metric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(E, D, variances): E = M^{1/2} P, D = P^T M^{-1/2} with P the axes of M^{1/2} S M^{1/2}, variances falling.

    Squared error in the latents is error in the metric, and the latents are uncorrelated: the optimal transform of
    transform coding. With M the query Gram the variances are the squared singular values of K Q^T.
    """
    root, inverse = matrix_root(metric)
    w, p = torch.linalg.eigh(root @ covariance @ root)
    return root @ p.flip(-1), p.flip(-1).mT @ inverse, w.flip(-1).clamp_min(0)


def kqsvd_factors(key_gram: torch.Tensor, query_gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """KQ-SVD's own factors (A, B, s) from the Grams: A = K^+ U, B = K^T U for K Q^T = U S V^T.

    A^T G_K A = I, B^T G_Q B = S^2, A^T B = I. Used by tests; the coder uses the scaled form of `klt`.
    """
    root, inverse = matrix_root(query_gram)
    w, p = torch.linalg.eigh(root @ key_gram @ root)
    s = w.flip(-1).clamp_min(0).sqrt()
    p = p.flip(-1)
    return root @ p / s[..., None, :], inverse @ p * s[..., None, :], s


def signed_hadamard(dim: int, seed: int) -> torch.Tensor:
    """Orthogonal [d, d]: random signs times Hadamard; for other dims blocks of the largest power of two dividing it."""
    block = dim & -dim
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < block:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)), 0)
    full = torch.block_diag(*[h / block**0.5] * (dim // block))
    gen = torch.Generator().manual_seed(seed)
    signs = 1 - 2 * torch.randint(0, 2, (dim,), generator=gen).double()
    mix = torch.linalg.qr(torch.randn(dim // block, dim // block, generator=gen, dtype=torch.float64))[0]
    return signs[:, None] * full @ torch.kron(mix.contiguous(), torch.eye(block, dtype=torch.float64))


def make_basis(
    name: str,
    covariance: torch.Tensor,
    reference: torch.Tensor,
    metrics: dict[str, torch.Tensor],
    query_gram: torch.Tensor | None = None,
    weight_gram: torch.Tensor | None = None,
    sharing: Sharing | None = None,
    seed: int = 0,
) -> Basis:
    """The basis `name` for data of `covariance` [H, d, d] (about the mean that is removed), measured in `reference`.

    metrics: by name, for the three KLT bases. query_gram (keys only) serves eigen and channel_prune, weight_gram
    weight_svd and lorc, sharing recalkv and head_merge (None: every head its own). All [H, d, d] float64 in the frame
    of the coder. Raises CalibrationError for what is missing.
    """
    heads, dim = covariance.shape[:2]
    eye = torch.eye(dim, dtype=covariance.dtype).expand(heads, -1, -1)
    if name in metrics:
        encode, decode, _ = klt(covariance, metrics[name])
    elif name in ("ksvd", "recalkv", "head_merge"):
        pooled = covariance if sharing is None else sharing.pooled(covariance)
        encode, decode, _ = klt(pooled, eye)
        if sharing is not None:
            encode, decode = sharing.align @ encode, decode @ sharing.align.mT
    elif name == "matryoshka":
        encode = train_nested(covariance, reference)
        decode = encode.mT
    elif name == "eigen":
        encode, decode, _ = klt(covariance if query_gram is None else covariance + query_gram, eye)
    elif name in ("weight_svd", "lorc"):
        if weight_gram is None:
            raise CalibrationError(f"basis {name!r} needs k_proj and v_proj weights of their own; choose another basis")
        encode, decode, _ = klt(weight_gram, eye)
    elif name in ("channel_prune", "identity"):
        encode, decode = eye.clone(), eye.clone()
    elif name == "hadamard":
        encode = torch.stack([signed_hadamard(dim, seed + h) for h in range(heads)])
        decode = encode.mT
    else:
        raise CalibrationError(f"basis {name!r} asked for; choose one of {', '.join(BASES)}")
    variance = torch.einsum("hdc,hde,hec->hc", encode, covariance, encode).clamp_min(0)
    weight = torch.einsum("hcd,hde,hce->hc", decode, reference, decode)
    score = variance * weight
    if name == "channel_prune" and query_gram is not None:  # ThinK: |K_c|^2 |Q_c|^2
        score = variance * query_gram.diagonal(dim1=-2, dim2=-1)
    owner = tuple(range(heads)) if sharing is None else sharing.owner
    if sharing is not None:  # one order for the heads of a group
        score = torch.stack([score[[g for g in range(heads) if owner[g] == o]].mean(0) for o in owner])
    if name in _OWN_ORDER:
        score = -torch.arange(dim, dtype=score.dtype).expand(heads, -1)
    order = torch.argsort(score, dim=-1, descending=True, stable=True)
    columns = order[:, None, :].expand(-1, dim, -1)
    return Basis(
        encode.gather(2, columns),
        decode.mT.gather(2, columns).mT.contiguous(),
        variance.gather(1, order),
        weight.gather(1, order),
        owner,
    )
