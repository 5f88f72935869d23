# SPDX-License-Identifier: Apache-2.0
"""kqsvd plan: block arithmetic by hand, sizes, refusals."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.projections import tiny_config, tiny_projection
from vllm_kqsvd import cli
from vllm_kqsvd.capacity import BLOCK, WINDOW, latent, plain, plan_bytes
from vllm_kqsvd.errors import UnsupportedError
from vllm_kqsvd.layout import TILE
from vllm_kqsvd.plan_capacity import size
from vllm_kqsvd.projection import save_projection


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder without weights: 3 layers, 2 KV heads of 32, so 768 bytes per token in bf16."""
    tiny_config().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def test_sizes() -> None:
    assert size("80GB") == size("80 GiB") == 80 * 2**30 and size("32k") == 32768 and size("1.5m") == 1.5 * 2**20
    for text in ("", "GB", "-1", "1e9", "80 bananas"):
        with pytest.raises(argparse.ArgumentTypeError):
            size(text)


def test_blocks_by_hand() -> None:
    bf16 = plain("bf16", 384, 2)
    assert bf16.block_bytes == 16 * 768 and bf16.blocks_per_request(100) == 7
    assert bf16.users(70 * 16 * 768, 100) == 10 and bf16.tokens(70 * 16 * 768, 100) == 1000
    # 204 latent bytes instead of 768: 128 * 204 / 768 = 34 exact tokens fit a page, so 32; 79 touch up to 4 pages
    ours = latent("x", 204, 384)
    assert ours.window_blocks == 4 and ours.blocks_per_request(1000) == 8 + 4
    assert ours.bytes_of_request(1000) == 12 * 128 * 204
    assert latent("x", 204, 384, window=0).window_blocks == 0
    with pytest.raises(UnsupportedError, match="block-size"):
        _ = latent("x", 60, 384).window_blocks
    assert [plan_bytes(b, 128) for b in (4, 3, 2.5, 2)] == [130, 98, 82, 66]
    assert plan_bytes(4, 64) == 66 and plan_bytes(3, 64) == 50


@pytest.mark.parametrize("bits", [4, 3, 2.5, 2])
@pytest.mark.parametrize(
    ("layers", "heads", "dim"), [(30, 3, 64), (28, 2, 128), (32, 8, 128), (80, 8, 128), (28, 16, 256)]
)
def test_window_blocks_are_those_of_the_plugin(layers: int, heads: int, dim: int, bits: float) -> None:
    window = pytest.importorskip("vllm_kqsvd.attention.window")
    exact, page = 4 * heads * dim, BLOCK * heads * plan_bytes(bits, dim)
    spec = window.WindowSpec(
        block_size=window.window_block_size(page, exact),
        num_kv_heads=heads,
        head_size=dim,
        dtype=torch.bfloat16,
        sliding_window=WINDOW + TILE - 1,
        page_size_padded=page,
    )
    config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=1 << 15))
    want = spec.max_memory_usage_bytes(config) // spec.page_size_bytes
    ours = latent("x", layers * heads * plan_bytes(bits, dim), layers * heads * 2 * dim)
    assert ours.window_blocks == want and ours.block_bytes == layers * page


def test_plan_of_a_model(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_projection(tiny_projection(), tmp_path / "p")
    argv = ["plan", str(model), "--kv-memory", "1GB", "--context", "4k", "--users", "600"]
    png = tmp_path / "plan.png"
    assert cli.main([*argv, "--projection", str(tmp_path / "p"), "--json", "--plot", str(png)]) == 0
    data = json.loads(capsys.readouterr().out)
    rows = {f["name"]: f for f in data["formats"]}
    assert rows["bf16"]["bytes_per_token"] == 768 and rows["bf16"]["max_users"] == 341.33 and not rows["bf16"]["fits"]
    assert rows["kqsvd 4 bits"]["bytes_per_token"] == 6 * 34 == rows["this projection"]["bytes_per_token"]
    assert rows["kqsvd 4 bits"]["fits"] and rows["kqsvd 2 bits"]["kv_tokens"] > rows["kqsvd 4 bits"]["kv_tokens"]
    assert png.read_bytes().startswith(b"\x89PNG")
    assert cli.main(argv) == 0
    assert "600 users" in capsys.readouterr().out
    assert cli.main([*argv[:-1], "100000"]) == 1  # no format serves so many


def test_memory_left_by_the_weights(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", str(model), "--gpu", "10GB", "--overhead", "1GB", "--utilization", "0.9", "--json"]
    assert cli.main([*argv, "--weights", "6GB", "--tp", "2"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["kv_memory"] == 5 * 2**30 and data["formats"][0]["bytes_per_token"] == 384
    assert cli.main(argv) == 1
    assert "--weights" in capsys.readouterr().err
    assert cli.main([*argv, "--weights", "8GB"]) == 1
    assert "leave nothing" in capsys.readouterr().err


def test_models_it_cannot_plan_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import Gemma3TextConfig, MistralConfig

    Gemma3TextConfig(num_hidden_layers=7).save_pretrained(tmp_path / "gemma")
    MistralConfig(sliding_window=4096).save_pretrained(tmp_path / "mistral")
    for name in ("gemma", "mistral"):
        assert cli.main(["plan", str(tmp_path / name), "--kv-memory", "1GB"]) == 1
        assert "whole context" in capsys.readouterr().err
    assert cli.main(["plan", str(tmp_path), "--kv-memory", "1GB"]) == 1
