# SPDX-License-Identifier: Apache-2.0
"""The projection file: what is written is read again, and belongs to one model only."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch

from tests.projections import HEAD_DIM, tiny_config, tiny_projection, write_model
from vllm_kqsvd.codec import SideCodec
from vllm_kqsvd.errors import ProjectionFileError
from vllm_kqsvd.projection import ModelFingerprint, Projection, load_projection, save_projection

GOLDEN = Path(__file__).parent / "data" / "projection_v1"
GOLDEN_DIGEST = "15cf939196467c864a0de917736959bb31442f6175c53695561f10b6ee2a9759"


def same(a: Projection, b: Projection) -> None:
    """Assert that two projections agree in everything."""
    assert (a.calibration, a.predicted, a.created_by) == (b.calibration, b.predicted, b.created_by)
    assert not a.model.differences(b.model) and a.layers.keys() == b.layers.keys()
    for i, x in a.layers.items():
        y = b.layers[i]
        for f in fields(x):
            if f.name not in ("codec", "spectrum"):
                assert getattr(x, f.name) == getattr(y, f.name)
        assert x.codec.plan == y.codec.plan and x.codec.rope_block == y.codec.rope_block
        for side in ("k", "v"):
            for f in fields(SideCodec):
                if f.name != "plan":
                    assert torch.equal(getattr(getattr(x.codec, side), f.name), getattr(getattr(y.codec, side), f.name))
            assert (x.spectrum is None) == (y.spectrum is None)
            assert x.spectrum is None or torch.equal(x.spectrum[side], y.spectrum[side])


@pytest.mark.parametrize("spectrum", [True, False])
def test_what_is_written_is_read(tmp_path: Path, spectrum: bool) -> None:
    projection = tiny_projection(spectrum=spectrum)
    digest = save_projection(projection, tmp_path / "p")
    read = load_projection(tmp_path / "p")
    assert read.digest == digest and len(digest) == 64
    same(projection, read)


def test_equal_projections_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_projection(tiny_projection(), tmp_path / name)
    files = sorted(f.name for f in (tmp_path / "a").iterdir())
    assert {"kqsvd.safetensors", "kqsvd_config.json", "README.md"} <= set(files)
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_saved_again_unchanged(tmp_path: Path) -> None:
    first = save_projection(tiny_projection(), tmp_path / "p")
    assert save_projection(load_projection(tmp_path / "p"), tmp_path / "p") == first


def test_golden_file_of_version_1_is_read_forever() -> None:
    projection = load_projection(GOLDEN)
    assert projection.digest == GOLDEN_DIGEST
    assert [e.rope_mode for e in projection.layers.values()] == ["page", "post"]
    k, v = projection.layers[0].codec.k, projection.layers[1].codec.v
    assert k.plan.group_bits == (8,) and v.plan.group_bits == (4,)
    assert k.encode[0, 1, 2] == -0.40625 and v.decode[0, 3, 4] == 0.3125 and k.mean_basis.shape == (16, 1)
    assert projection.layers[1].max_position == 8192 and projection.model.rope[0].rotary_dim == 16


def test_layers_are_found_by_hf_and_vllm_names() -> None:
    projection = tiny_projection()
    for name in ("model.layers.1.self_attn", "model.layers.1.self_attn.attn"):
        assert projection.layer(name).index == 1
    assert projection.layer("language_model.model.layers.2.self_attn.attn").index == 2
    for name in ("model.layers.7.self_attn.attn", "visual.layers.1.self_attn", ""):
        assert projection.find(name) is None
    with pytest.raises(ProjectionFileError, match=r"layers.9.*has 3 layers.*calibrate"):
        projection.layer("model.layers.9.self_attn")


def test_shard_has_its_heads() -> None:
    whole = tiny_projection()
    part = whole.at_heads(1, 2)
    assert part.layers[0].codec.num_kv_heads == 1 and 2 * part.bytes_per_token == whole.bytes_per_token
    assert torch.equal(part.layers[2].codec.k.encode, whole.layers[2].codec.k.encode[1:2])
    assert part.layers[0].spectrum["k"].shape == (1, HEAD_DIM)
    for start, stop in ((0, 3), (-1, 1), (1, 1)):
        with pytest.raises(ProjectionFileError, match="KV heads"):
            whole.at_heads(start, stop)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 4}, "num_layers 3 in the file, 4 in the model"),
        ({"num_attention_heads": 8}, "num_heads 4 in the file, 8 in the model"),
        ({"num_key_value_heads": 1}, "num_kv_heads 2 in the file, 1 in the model"),
        ({"head_dim": 16}, "head_dim 32 in the file, 16 in the model"),
        ({"architectures": ["MistralForCausalLM"]}, "LlamaForCausalLM in the file, MistralForCausalLM in the model"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta 10000.0.* rope_theta 500000.0"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "default RoPE.*linear RoPE"),
    ],
)
def test_another_model_is_refused_naming_both(change: dict, message: str) -> None:
    with pytest.raises(ProjectionFileError, match=message):
        tiny_projection().check_model(tiny_config(**change))


def test_weights_are_part_of_the_model(tmp_path: Path) -> None:
    model, other = write_model(tmp_path / "a"), write_model(tmp_path / "b", seed=1)
    fingerprint = ModelFingerprint.from_hf(model)
    assert len(fingerprint.weights_sha256) == 64
    projection = tiny_projection(fingerprint)
    projection.check_model(model)
    projection.check_model(str(model))
    with pytest.raises(ProjectionFileError, match="weights .* in the file, .* in the model"):
        projection.check_model(other)
    projection.check_model(fingerprint.without_weights())


def test_unreadable_model_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ProjectionFileError, match=r"no config\.json"):
        ModelFingerprint.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ProjectionFileError, match="cannot read"):
        ModelFingerprint.from_hf(tmp_path)
    model = write_model(tmp_path / "m")
    (model / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ProjectionFileError, match="weights"):
        ModelFingerprint.from_hf(model)


def test_model_without_rope(tmp_path: Path) -> None:
    from transformers import GPT2Config

    config = GPT2Config(n_layer=3, n_head=2, n_embd=64, architectures=["GPT2LMHeadModel"])
    model = ModelFingerprint.from_config(config)
    assert (model.num_kv_heads, model.head_dim, model.rope[0].rotary_dim) == (2, 32, 0)
    source = tiny_projection(model)
    layers = {0: source.layers[2], 1: source.layers[2], 2: source.layers[2]}
    from dataclasses import replace

    layers = {i: replace(e, index=i, name=f"transformer.h.{i}.attn") for i, e in layers.items()}
    save_projection(replace(source, layers=layers), tmp_path / "p")
    load_projection(tmp_path / "p").check_model(config)
