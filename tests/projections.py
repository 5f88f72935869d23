# SPDX-License-Identifier: Apache-2.0
"""Tiny projections for the tests of the projection file and of the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.helpers import random_codec, side_plan
from vllm_kqsvd.plan import LayerPlan
from vllm_kqsvd.projection import LayerEntry, ModelFingerprint, Projection

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 3, 4, 2, 32


def tiny_config(**overrides: Any) -> Any:
    """A Llama config of three layers."""
    from transformers import LlamaConfig

    options = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
        "architectures": ["LlamaForCausalLM"], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }  # fmt: skip
    return LlamaConfig(**{**options, **overrides})


def write_model(folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """A saved random model of `tiny_config`."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    LlamaForCausalLM(tiny_config(**overrides)).save_pretrained(folder)
    return folder


def tiny_projection(model: ModelFingerprint | None = None, *, spectrum: bool = True) -> Projection:
    """Three layers in three rope modes (page, post, none), two plans each."""
    model = model or ModelFingerprint.from_config(tiny_config(), "ab" * 32)
    layers = {}
    modes = (("page", 32, None), ("post", 0, 4096), ("none", 0, None))
    for i, (mode, block, longest) in enumerate(modes):
        codec = random_codec(LayerPlan(side_plan(6, 2), side_plan(4, 4)), KV_HEADS, HEAD_DIM, block, seed=i)
        codec = replace(codec, rope=model.rope[0].spec())
        curve = torch.linspace(2, 0.1, HEAD_DIM).expand(KV_HEADS, -1)
        layers[i] = LayerEntry(
            i, f"model.layers.{i}.self_attn", mode, block, 0, longest, "kq", "fisher", codec,
            {"k": curve * (i + 1), "v": curve} if spectrum else None,
        )  # fmt: skip
    calibration = {"data": [{"name": "text.txt", "sha256": "0" * 64}], "seed": 0, "tokens": 4096, "windows": 2}
    return Projection(model, layers, calibration, [0.01, 0.02, 0.03])
