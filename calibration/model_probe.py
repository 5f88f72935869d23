# SPDX-License-Identifier: Apache-2.0
"""Finds out from one forward pass how a model's attention layers are built, RoPE variant included.

In a text of one repeated token every layer sees the same hidden state at every position (attention over equal values
returns that value), so keys before RoPE are all equal. The right rotation is therefore the one that, undone, makes
them equal; no knowledge of the architecture is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from vllm_kqsvd.calibration.capture import AttentionCall, observe
from vllm_kqsvd.errors import UnsupportedError
from vllm_kqsvd.ops.rope_block import RopeSpec, rotate

_POSITIONS = 48
_TOLERANCE = 0.05  # largest relative change of the key over positions; wrong rotations give about 1
_OUTPUT_NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo")
NO_ROPE = RopeSpec(torch.empty(0, dtype=torch.float64))


@dataclass(frozen=True)
class LayerInfo:
    """One attention layer: position in the model, module name, shape, rotation, softmax scale."""

    index: int
    name: str
    module: nn.Module
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeSpec
    scale: float

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    def output_weight(self) -> torch.Tensor | None:
        """W_O as [Hq, d, hidden] float64 on the CPU, or None if no plain linear output projection is found."""
        for name in _OUTPUT_NAMES:
            weight = getattr(getattr(self.module, name, None), "weight", None)
            if weight is not None and weight.ndim == 2 and weight.shape[1] == self.num_heads * self.head_dim:
                return weight.detach().double().cpu().T.reshape(self.num_heads, self.head_dim, -1)
        return None

    def projection_weight(self, side: str) -> torch.Tensor | None:
        """W_K or W_V ("k" or "v") as [H, d, hidden] float64 on the CPU, or None if it has no module of its own."""
        weight = getattr(getattr(self.module, f"{side}_proj", None), "weight", None)
        if weight is None or weight.shape[0] != self.num_kv_heads * self.head_dim:
            return None
        return weight.detach().double().cpu().reshape(self.num_kv_heads, self.head_dim, -1)


def _rope_candidates(model: PreTrainedModel) -> list[RopeSpec]:
    """No RoPE, and every distinct `inv_freq` buffer of the model in both pairings."""
    found: list[torch.Tensor] = []
    for name, buffer in model.named_buffers():
        plain = name.endswith("inv_freq") and "original" not in name
        if plain and not any(torch.equal(buffer.double().cpu(), f) for f in found):
            found.append(buffer.detach().double().cpu())
    return [NO_ROPE] + [RopeSpec(f, interleaved) for f in found for interleaved in (False, True)]


def _spread(k: torch.Tensor, rope: RopeSpec) -> float:
    """Relative change over positions of k [H, T, d] after undoing `rope`."""
    back = rotate(k.double().cpu().transpose(0, 1), -torch.arange(k.shape[1]), rope)
    return float(((back - back[:1]).norm(dim=-1) / back[:1].norm(dim=-1).clamp_min(1e-30)).amax())


@torch.no_grad()
def probe(model: PreTrainedModel) -> list[LayerInfo]:
    """Every attention layer in the order it runs. Raises UnsupportedError if a layer's rotation is not understood."""
    kind = str((getattr(model.config, "rope_parameters", None) or {}).get("rope_type", "default"))
    if kind in ("dynamic", "longrope"):
        raise UnsupportedError(
            f"RoPE of type {kind!r}: its frequencies depend on the length of the text, so cached keys have no fixed "
            "frame; give the model's config a fixed scaling (yarn, linear, llama3)"
        )
    names = {id(m): n for n, m in model.named_modules()}
    calls: list[AttentionCall] = []
    token = 1 + model.config.get_text_config().vocab_size // 3
    ids = torch.full((1, _POSITIONS), token, device=model.device)
    with observe(calls.append):
        model.base_model(input_ids=ids, use_cache=False)
    if not calls:
        raise UnsupportedError(
            f"{type(model).__name__} does not use transformers' attention interface; its attention cannot be observed"
        )
    candidates = _rope_candidates(model)
    layers = []
    for index, call in enumerate(calls):
        fits = [r for r in candidates if r.rotary_dim <= call.k.shape[-1]]
        spread, best = min(((_spread(call.k, r), i) for i, r in enumerate(fits)), default=(1.0, 0))
        if spread > _TOLERANCE:
            raise UnsupportedError(
                f"layer {index} ({names[id(call.module)]}): no known rotation explains its keys (change over positions "
                f"{spread:.2g}); only RoPE with fixed frequencies, or none, is supported"
            )
        layers.append(
            LayerInfo(
                index,
                names[id(call.module)],
                call.module,
                call.q.shape[0],
                call.k.shape[0],
                call.k.shape[-1],
                fits[best],
                call.scale,
            )
        )
    return layers
