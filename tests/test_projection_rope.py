# SPDX-License-Identifier: Apache-2.0
"""RoPE settings agree with what transformers rotates by, and what cannot be coded is refused."""

from __future__ import annotations

import pytest
import torch

from tests.projections import tiny_config
from vllm_kqsvd.errors import UnsupportedError
from vllm_kqsvd.ops.rope_block import rotate
from vllm_kqsvd.projection import rope_settings

SCALED = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
}


@pytest.mark.parametrize("kind", SCALED)
def test_frequencies_are_those_of_transformers(kind: str) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = tiny_config(rope_parameters={"rope_type": kind, "rope_theta": 1e4, **SCALED[kind]})
    (setting,), index = rope_settings(config)
    assert index == [0, 0, 0] and setting.type == kind and not setting.interleaved
    key = torch.randn(50, 2, 32, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(50)
    cos, sin = LlamaRotaryEmbedding(config)(key, positions[None])
    want = apply_rotary_pos_emb(key.transpose(0, 1)[None], key.transpose(0, 1)[None], cos, sin)[0][0].transpose(0, 1)
    got = rotate(key, positions, setting.spec()) * setting.attention_factor
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert (setting.attention_factor > 1) == (kind == "yarn")


def test_interleaved_and_partial_as_transformers() -> None:
    from transformers import GlmConfig
    from transformers.models.glm.modeling_glm import GlmRotaryEmbedding, apply_rotary_pos_emb

    config = GlmConfig(
        hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_hidden_layers=1, vocab_size=64
    )
    (setting,), _ = rope_settings(config)
    assert setting.interleaved and setting.rotary_dim == 16
    key = torch.randn(9, 1, 32)
    cos, sin = GlmRotaryEmbedding(config)(key, torch.arange(9)[None])
    want = apply_rotary_pos_emb(key.transpose(0, 1)[None], key.transpose(0, 1)[None], cos, sin)[0][0].transpose(0, 1)
    torch.testing.assert_close(rotate(key, torch.arange(9), setting.spec()), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "unheard_of"])
def test_rope_that_changes_with_length_is_refused(kind: str) -> None:
    config = tiny_config()
    config.rope_parameters = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(UnsupportedError, match=f"{kind}.*supported are default, linear, llama3, yarn"):
        rope_settings(config)


def test_settings_per_layer_type_and_unrotated_layers() -> None:
    from transformers import Gemma3TextConfig, SmolLM3Config

    gemma = Gemma3TextConfig(num_hidden_layers=7, hidden_size=64, num_attention_heads=2, head_dim=32)
    settings, index = rope_settings(gemma)
    assert len(settings) == 2 and len(index) == 7
    thetas = [settings[i].parameters["rope_theta"] for i in index]
    assert thetas == [1e4] * 5 + [1e6] + [1e4]
    smol = SmolLM3Config(num_hidden_layers=4, hidden_size=64, num_attention_heads=2, num_key_value_heads=1)
    assert rope_settings(smol)[1] == [0, 0, 0, None]


def test_model_whose_keys_vllm_permutes_is_refused() -> None:
    config = tiny_config()
    config.model_type = "llama4_text"
    with pytest.raises(UnsupportedError, match="another order"):
        rope_settings(config)


def test_matching_tolerates_rounding_only() -> None:
    (a,), _ = rope_settings(tiny_config())
    (b,), _ = rope_settings(tiny_config(rope_parameters={"rope_type": "default", "rope_theta": 10001.0}))
    (c,), _ = rope_settings(tiny_config(rope_parameters={"rope_type": "default", "rope_theta": 10000}))
    assert a.matches(c) and not a.matches(b)
