# SPDX-License-Identifier: Apache-2.0
"""One forward pass tells pairing, rotated width and layers without RoPE, whatever the architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from tests.calibration.conftest import byte_tokenizer, make_model
from vllm_kqsvd.calibration.calibrate import CalibrateOptions, calibrate
from vllm_kqsvd.calibration.capture import load_model
from vllm_kqsvd.calibration.collect import CollectOptions
from vllm_kqsvd.calibration.model_probe import probe
from vllm_kqsvd.errors import CalibrationError, UnsupportedError

SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
SMALL = CollectOptions(
    num_windows=4, window_length=160, gradient_windows=2, gradient_length=128, samples=400, window=32
)


def save(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("config", "model", "extra", "want"),
    [
        (CohereConfig, CohereForCausalLM, {}, [(32, True), (32, True)]),
        (PhiConfig, PhiForCausalLM, {"partial_rotary_factor": 0.5}, [(16, False), (16, False)]),
        (SmolLM3Config, SmolLM3ForCausalLM, {"no_rope_layers": [1, 0]}, [(32, False), (0, False)]),
    ],
)
def test_rotations_are_found_and_calibrated(
    config: Any, model: Any, extra: dict[str, Any], want: list[tuple[int, bool]], tmp_path: Path, text_file: Path
) -> None:
    torch.manual_seed(3)
    folder = save(tmp_path / "m", model(config(**SHAPE, **extra)))
    layers = probe(load_model(str(folder), "cpu", torch.float32))
    assert [(x.rope.rotary_dim, x.rope.interleaved) for x in layers] == want
    assert all(x.output_weight() is not None for x in layers)
    projection = calibrate(folder, [text_file], CalibrateOptions(collect=SMALL))
    modes = [projection.layers[i].rope_mode for i in range(2)]
    assert modes == ["page" if width else "none" for width, _ in want]


def test_rope_scaling_is_read_from_the_model(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e4}
    folder = save(tmp_path / "m", LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=scaling)))
    layers = probe(load_model(str(folder), "cpu", torch.float32))
    plain = 1e4 ** -(torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    assert layers[0].rope.rotary_dim == 32
    assert not torch.allclose(layers[0].rope.inv_freq, plain, rtol=1e-3)


@pytest.mark.parametrize(("head_dim", "block"), [(32, 32), (80, 64)])
def test_many_wide_query_heads_per_kv_head_get_longer_blocks(
    tmp_path: Path, text_file: Path, head_dim: int, block: int
) -> None:
    folder = make_model(tmp_path / "m", "llama", heads=6, kv_heads=1, head_dim=head_dim)
    projection = calibrate(folder, [text_file], CalibrateOptions(collect=SMALL))
    assert {e.rope_block for e in projection.layers.values()} == {block}


def test_what_has_no_fixed_rotation_is_refused(tmp_path: Path, text_file: Path) -> None:
    absolute = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=128, n_layer=1, n_head=4, initializer_range=0.3))
    folder = save(tmp_path / "gpt2", absolute)
    with pytest.raises(UnsupportedError, match="no known rotation explains"):
        probe(load_model(str(folder), "cpu", torch.float32))
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    folder = save(tmp_path / "dynamic", LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=dynamic)))
    with pytest.raises(UnsupportedError, match="dynamic"):
        probe(load_model(str(folder), "cpu", torch.float32))
    with pytest.raises(CalibrationError, match="cannot load"):
        load_model(str(tmp_path), "cpu", torch.float32)
