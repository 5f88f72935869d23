# SPDX-License-Identifier: Apache-2.0
"""One layer's coder on a device: encode and decode matrices, means and scale weights (docs/format.md, 1).

`LayerCodec` is what every kernel's constants are made from and what the reference computes with. Reading
it from disk is `projection`'s job; how its numbers were found is `calibration`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from vllm_kqsvd.errors import PlanError
from vllm_kqsvd.layout import LatentLayout, layout_of
from vllm_kqsvd.ops.rope_block import RopeSpec
from vllm_kqsvd.plan import LayerPlan, SidePlan

MEAN_RANK = 16  # columns of the mean tile: one tensor-core k-step
SINK_RATIO = 0.3  # a token is a sink if |x - sink|^2 < SINK_RATIO * |x - mean|^2


@dataclass(frozen=True)
class SideCodec:
    """Coder of K or V. H kv heads, d head_dim, R rank; all float32 (float64 in tests).

    encode [H, d, R]: (x - mean) @ encode = latents in units of the quantizer step.
    decode [H, R, d]: the way back, x ~= mean + ((code - zero_point) * scale) @ decode; where codes are coarse not the
        inverse but less (calibration/shaping.py).
    scale_weight [H, R]: token scale = sqrt(sum_c scale_weight_c * latent_c^2), and at least
    guard_weight [H, R]: max_c guard_weight_c * |latent_c| (keeps outliers from clipping into nonsense).
    mean_basis [T, M]: mean of in-block offset j is mean_basis[j] @ mean; T = 1, M = 1 where no offset counts.
    mean, sink [H, M, d]: ordinary mean and sink prototype; equal where a head has no sinks.
    """

    plan: SidePlan
    encode: torch.Tensor
    decode: torch.Tensor
    scale_weight: torch.Tensor
    guard_weight: torch.Tensor
    mean_basis: torch.Tensor
    mean: torch.Tensor
    sink: torch.Tensor

    def __post_init__(self) -> None:
        heads, dim, rank = self.encode.shape
        basis, width = self.mean_basis.shape
        want = {
            "encode": (heads, dim, self.plan.rank),
            "decode": (heads, rank, dim),
            "scale_weight": (heads, rank),
            "guard_weight": (heads, rank),
            "mean": (heads, width, dim),
            "sink": (heads, width, dim),
        }
        for name, shape in want.items():
            if tuple(getattr(self, name).shape) != shape:
                raise PlanError(f"codec.{name} has shape {tuple(getattr(self, name).shape)}, not {shape}")

    def channel_bits(self) -> torch.Tensor:
        """Code width of every channel: [R] int64 on the codec's device."""
        bits = torch.tensor(self.plan.group_bits, device=self.encode.device)
        return bits.repeat_interleave(16)

    def heads(self, start: int, stop: int) -> SideCodec:
        """The coder of KV heads [start, stop) (tensor parallel shard)."""
        cut = {f.name: getattr(self, f.name)[start:stop] for f in fields(self) if f.name not in ("plan", "mean_basis")}
        return replace(self, **cut)

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> SideCodec:
        """A copy with every tensor on `device` in `dtype`."""
        moved = {f.name: getattr(self, f.name).to(device, dtype) for f in fields(self) if f.name != "plan"}
        return replace(self, **moved)


@dataclass(frozen=True)
class LayerCodec:
    """Coders of one layer. `rope_block` T: keys are turned back to their block of T positions; 0: never."""

    k: SideCodec
    v: SideCodec
    rope: RopeSpec
    rope_block: int

    def __post_init__(self) -> None:
        t = self.rope_block
        if t and t & (t - 1):
            raise PlanError(f"rope block of {t} positions asked for; it must be a power of two, or 0")
        if self.k.mean_basis.shape[0] not in (1, t):
            raise PlanError(f"key mean has {self.k.mean_basis.shape[0]} offsets, rope block has {t}")

    @property
    def plan(self) -> LayerPlan:
        """Bit plans of both sides."""
        return LayerPlan(self.k.plan, self.v.plan)

    @property
    def layout(self) -> LatentLayout:
        """Page layout of this layer."""
        return layout_of(self.plan)

    @property
    def num_kv_heads(self) -> int:
        """KV heads this codec covers (after sharding)."""
        return self.k.encode.shape[0]

    @property
    def head_dim(self) -> int:
        """Width of a key or value."""
        return self.k.encode.shape[1]

    def heads(self, start: int, stop: int) -> LayerCodec:
        """The codec of KV heads [start, stop)."""
        return replace(self, k=self.k.heads(start, stop), v=self.v.heads(start, stop))

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> LayerCodec:
        """A copy on `device`."""
        return replace(self, k=self.k.to(device, dtype), v=self.v.to(device, dtype))
