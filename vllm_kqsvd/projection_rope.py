# SPDX-License-Identifier: Apache-2.0
"""RoPE settings of a Hugging Face model, as the projection file records and checks them.

Only position-independent frequencies can be coded in rope blocks (R_a R_b = R_{a+b}), so `dynamic` and
`longrope`, whose frequencies change with the sequence length, are refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_kqsvd.errors import UnsupportedError
from vllm_kqsvd.ops.rope_block import RopeSpec

ROPE_TYPES = ("none", "default", "linear", "llama3", "yarn")
# model types whose attention rotates pairs (2i, 2i + 1); all others rotate (i, i + rotary_dim / 2)
INTERLEAVED_MODEL_TYPES = frozenset(("cohere", "cohere2", "ernie4_5", "ernie4_5_moe", "glm", "glm4", "gptj"))
# model types whose key channels vLLM orders otherwise than transformers: a basis would not fit
PERMUTED_MODEL_TYPES = frozenset(("llama4", "llama4_text"))
_PARAMETERS = (
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "partial_rotary_factor",
    "mrope_section",
    "mrope_interleaved",
)


@dataclass(frozen=True, eq=False)
class RopeSetting:
    """One distinct RoPE of a model.

    type: one of ROPE_TYPES. parameters: JSON values, always with `attention_factor` (cos and sin are
    multiplied by it; 1 except for yarn). inv_freq [rotary_dim / 2] float64: radians per position.
    """

    rotary_dim: int
    interleaved: bool
    type: str
    parameters: dict[str, Any]
    inv_freq: torch.Tensor = field(repr=False)

    @property
    def attention_factor(self) -> float:
        """Length of a rotated vector over that of the unrotated one."""
        return float(self.parameters.get("attention_factor", 1.0))

    @property
    def has_sections(self) -> bool:
        """Whether positions are three-dimensional (mRoPE), so that no rope block exists."""
        return bool(self.parameters.get("mrope_section"))

    def spec(self) -> RopeSpec:
        """What the coder needs of it."""
        return RopeSpec(self.inv_freq, self.interleaved)

    def matches(self, other: RopeSetting) -> bool:
        """Whether both rotate alike (frequencies within 1e-5 relative, same pairing, same factor)."""
        return (
            self.rotary_dim == other.rotary_dim
            and (self.interleaved == other.interleaved or self.rotary_dim == 0)
            and self.parameters.get("mrope_section") == other.parameters.get("mrope_section")
            and abs(self.attention_factor - other.attention_factor) < 1e-5
            and torch.allclose(self.inv_freq, other.inv_freq, rtol=1e-5, atol=0.0)
        )

    def describe(self) -> str:
        """One phrase for messages: type, width, pairing, parameters."""
        pairing = "interleaved" if self.interleaved else "neox"
        inside = ", ".join(f"{k} {v}" for k, v in sorted(self.parameters.items()))
        return f"{self.type} RoPE ({self.rotary_dim} dims, {pairing}, {inside})"


def no_rope() -> RopeSetting:
    """The setting of a model without RoPE."""
    empty = torch.empty(0, dtype=torch.float64)
    return RopeSetting(0, False, "none", {"attention_factor": 1.0}, empty)


def head_dim_of(config: Any) -> int:
    """Width of a key of a Hugging Face text config."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_settings(config: Any) -> tuple[list[RopeSetting], list[int | None]]:
    """Distinct RoPE settings of a text config, and for every layer the index of its own.

    None as an index: the layer is not rotated (NoPE). Raises UnsupportedError for a RoPE whose
    frequencies depend on the sequence length or whose type is unknown.
    """
    config = text_config(config)
    if config.model_type in PERMUTED_MODEL_TYPES:
        raise UnsupportedError(
            f"model type {config.model_type!r} is not supported: vLLM stores its key channels in another "
            "order than transformers, so a projection calibrated there would not fit"
        )
    params = _rope_parameters(config)
    if params is None:
        return [no_rope()], [None] * config.num_hidden_layers
    nested = {k: v for k, v in params.items() if isinstance(v, dict)}
    kinds = getattr(config, "layer_types", None)
    if nested and kinds:
        names = sorted({kind for kind in kinds if kind in nested})
        settings = [_setting(config, nested[name], name) for name in names]
        index: list[int | None] = [names.index(k) if k in names else None for k in kinds]
    else:
        settings, index = [_setting(config, params, None)], [0] * config.num_hidden_layers
    return settings, [None if _is_nope(config, i) else n for i, n in enumerate(index)]


def text_config(config: Any) -> Any:
    """The decoder's config of a possibly multimodal one."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _is_nope(config: Any, layer: int) -> bool:
    flags = getattr(config, "no_rope_layers", None)  # 1: rotated, 0: not (SmolLM3)
    if flags:
        return not flags[layer]
    kinds = getattr(config, "layer_types", None)
    local_only = config.model_type == "cohere2" or (
        config.model_type == "exaone4" and getattr(config, "sliding_window", None)
    )
    return bool(local_only and kinds and kinds[layer] == "full_attention")


def _rope_parameters(config: Any) -> dict[str, Any] | None:
    """`rope_parameters` (transformers 5), or the same made from rope_theta and rope_scaling."""
    params = getattr(config, "rope_parameters", None)
    if params:
        return dict(params)
    theta = getattr(config, "rope_theta", None)
    if theta is None and config.model_type != "gptj":
        return None
    scaling = getattr(config, "rope_scaling", None) or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    return {"rope_theta": theta or 10000.0, **scaling, "rope_type": kind}


def _setting(config: Any, params: dict[str, Any], layer_type: str | None) -> RopeSetting:
    kind = params.get("rope_type") or params.get("type") or "default"
    if kind == "mrope":
        kind = "default"
    if kind not in ROPE_TYPES:
        raise UnsupportedError(
            f"RoPE type {repr(kind)[:40]} is not supported: its frequencies depend on the sequence length or are "
            f"unknown here; supported are {', '.join(ROPE_TYPES[1:])}. Set `rope_parameters` in the "
            "model's config to one of these (yarn has the same purpose)"
        )
    factor = params.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None)
    width = int(head_dim_of(config) * (factor or 1.0))
    if config.model_type == "gptj" and config.rotary_dim:
        width = config.rotary_dim
    scale = 1.0
    if kind == "default":
        exponent = torch.arange(0, width, 2, dtype=torch.float) / width
        inv_freq = 1.0 / (params.get("rope_theta", 10000.0) ** exponent)
    else:
        inv_freq, scale = _scaled_frequencies(config, kind, layer_type)
    kept = {k: params[k] for k in _PARAMETERS if params.get(k) is not None}
    kept["attention_factor"] = float(scale)
    interleaved = config.model_type in INTERLEAVED_MODEL_TYPES
    return RopeSetting(2 * inv_freq.numel(), interleaved, kind, kept, inv_freq.double())


def _scaled_frequencies(config: Any, kind: str, layer_type: str | None) -> tuple[torch.Tensor, float]:
    """(inv_freq float32, attention factor) as transformers computes them."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    extra = {} if layer_type is None else {"layer_type": layer_type}
    try:
        return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), **extra)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as e:
        raise UnsupportedError(
            f"the model's {kind} RoPE parameters cannot be used ({type(e).__name__}: {e}); "
            "check `rope_parameters` in its config.json"
        ) from e
