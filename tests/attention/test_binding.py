# SPDX-License-Identifier: Apache-2.0
"""Which entry of a projection a vLLM layer gets, and which of its heads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.attention.models import write_model, write_projection
from tests.helpers import random_codec, side_plan
from vllm_kqsvd.config import KQSVDConfig
from vllm_kqsvd.errors import ConfigError, ProjectionFileError, UnsupportedError
from vllm_kqsvd.plan import LayerPlan
from vllm_kqsvd.projection import Projection

pytest.importorskip("vllm")
from vllm_kqsvd.attention import binding  # noqa: E402

PLAN = LayerPlan(side_plan(4, 4), side_plan(4, 4))


def named(*names: str) -> Projection:
    """A projection of which only layer names matter."""
    model = SimpleNamespace(architecture="Tiny")
    return Projection(model, {i: SimpleNamespace(name=n) for i, n in enumerate(names)})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("file", "served"),
    [
        ("model.layers.1.self_attn", "model.layers.1.self_attn.attn"),
        ("model.layers.1.self_attn", "language_model.model.layers.1.self_attn.attn"),
        ("model.language_model.layers.1.self_attn", "language_model.model.layers.1.self_attn.attn"),
        ("transformer.h.1.attn", "transformer.h.1.attn.attn"),
    ],
)
def test_layer_names(file: str, served: str) -> None:
    projection = named(file.replace(".1.", ".0."), file)
    assert projection.layer(served).name == file


@pytest.mark.parametrize("name", ["model.layers.2.self_attn.attn", "draft.layers.1.self_attn.attn"])
def test_unknown_layers(name: str) -> None:
    with pytest.raises(ProjectionFileError, match="calibrate the model"):
        named("model.layers.0.self_attn", "model.layers.1.self_attn").layer(name)


@pytest.mark.parametrize(
    ("heads", "world", "rank", "expected"),
    [(4, 1, 0, [0, 1, 2, 3]), (2, 2, 1, [2, 3]), (1, 4, 2, [2]), (1, 8, 5, [2])],
)
def test_tensor_parallel_shards(heads: int, world: int, rank: int, expected: list[int]) -> None:
    codec = random_codec(PLAN, heads=4, dim=32, rope_block=0)
    part = binding.shard(codec, heads, rank, world, "layer")
    assert torch.equal(part.k.decode, codec.k.decode[expected])


def test_impossible_shard_and_shapes() -> None:
    codec = random_codec(PLAN, heads=4, dim=32, rope_block=0)
    with pytest.raises(ProjectionFileError, match="3 KV heads on each of 2 ranks"):
        binding.shard(codec, 3, 0, 2, "layer")
    with pytest.raises(ProjectionFileError, match="head size 64"):
        binding.check_shape(codec, 64, 128, "layer")
    with pytest.raises(UnsupportedError, match="--block-size 32 asked for"):
        binding.check_shape(codec, 32, 32, "layer")


def test_open_and_check(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", num_hidden_layers=1)
    folder = write_projection(tmp_path / "p", model, layers=1)
    projection = binding.open_projection(KQSVDConfig(folder))
    assert binding.open_projection(KQSVDConfig(folder, digest=projection.digest[:8])) is projection
    with pytest.raises(ProjectionFileError, match="correct kqsvd.digest"):
        binding.open_projection(KQSVDConfig(folder, digest="0" * 8))
    with pytest.raises(ConfigError, match="no such folder"):
        binding.open_projection(KQSVDConfig(tmp_path / "absent"))
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    binding.check_served_model(projection, SimpleNamespace(model=str(model), hf_config=config))  # type: ignore[arg-type]
    config.num_key_value_heads = 1
    with pytest.raises(ProjectionFileError, match="num_kv_heads"):
        binding.check_served_model(projection, SimpleNamespace(model="hub/name", hf_config=config))  # type: ignore[arg-type]


def test_layers_of_unequal_size() -> None:
    small = LayerPlan(side_plan(2, 2), side_plan(4, 4))
    layers = {i: SimpleNamespace(codec=random_codec(p, heads=1, dim=32)) for i, p in enumerate((PLAN, PLAN, small))}
    equal = Projection(None, {0: layers[0], 1: layers[1]})  # type: ignore[arg-type, dict-item]
    mixed = Projection(None, layers)  # type: ignore[arg-type]
    binding.check_unequal_pages(equal, pipeline_stages=2, native_layers=1)
    binding.check_unequal_pages(mixed, pipeline_stages=1, native_layers=0)
    assert binding.mean_bytes(equal) is None
    assert binding.mean_bytes(mixed) == (2 * PLAN.bytes_per_token + small.bytes_per_token) // 3
    for stages, beside in ((2, 0), (1, 1)):
        with pytest.raises(UnsupportedError, match="layer-budgets equal"):
            binding.check_unequal_pages(mixed, stages, beside)
    pattern = Projection(None, {0: layers[0], 1: layers[2]})  # type: ignore[arg-type, dict-item]
    with pytest.raises(UnsupportedError, match="give one layer another size"):
        binding.check_unequal_pages(pattern, 1, 0)
