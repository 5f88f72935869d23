# SPDX-License-Identifier: Apache-2.0
"""kqsvd plan: block arithmetic by hand, sizes, refusals; memory and speed against measured rows."""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.projections import tiny_config, tiny_projection
from vllm_kqsvd import cli, decode_speed
from vllm_kqsvd.capacity import BLOCK, WINDOW, latent, plain, plan_bytes
from vllm_kqsvd.errors import UnsupportedError
from vllm_kqsvd.gpu_memory import usable
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
    assert (
        data["kv_memory"] == int(usable(10 * 2**30) * 0.9) - 4 * 2**30 and data["formats"][0]["bytes_per_token"] == 384
    )
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


WRONG = {
    "--users 0": "--users is 0; it must be at least 1",
    "--context 0": "--context is 0",
    "--tp 0": "--tp is 0",
    "--gpu 0": "--gpu is 0",
    "--tp 3": "vLLM splits 4 query and 2 KV heads only over",
    "--utilization nan": "a share",
    "--utilization 5": "a share",
    "--window 0": "multiples of 16 from 32 on",
    "--window 40": "multiples of 16 from 32 on",
    "--overhead 500GB --weights 6GB": "500.0 GiB on each for activations and CUDA graphs leave nothing of 80 GiB",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_absurd_numbers_are_refused_in_one_line(wrong: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory = [] if "weights" in wrong else ["--kv-memory", "1GB"]
    assert cli.main(["plan", str(model), *memory, *wrong.split()]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and WRONG[wrong] in err


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"num_hidden_layers": 0}, "0 layers"),
        ({"num_attention_heads": 0}, "cannot read"),
        ({"model_type": "unheard of"}, "cannot read"),
        ({"head_dim": 24}, "head width is 24"),
    ],
)
def test_configs_without_a_cache_are_refused(change: dict, found: str, model: Path, capsys) -> None:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert cli.main(["plan", str(model), "--kv-memory", "1GB"]) == 1
    assert found in capsys.readouterr().err


def test_contexts_beyond_the_model_are_marked(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    positions = tiny_config().max_position_embeddings
    for context, told in ((positions, False), (positions + 1, True)):
        assert cli.main(["plan", str(model), "--kv-memory", "1GB", "--context", str(context)]) == 0
        assert (f"names {positions:,} positions" in capsys.readouterr().out) == told


SERVING = Path(__file__).parents[1] / "benchmarks" / "results" / "serving.csv"
FORMATS = {"auto": "bf16", "fp8": "fp8", "kqsvd-4": "kqsvd 4 bits", "kqsvd-2.5": "kqsvd 2.5 bits"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of an 8B Llama, the model of serving.csv."""
    from benchmarks.shapes import model_folder

    return model_folder("llama-3.1-8b", tmp_path_factory.mktemp("shapes"))


def planned(argv: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, dict]:
    """Rows of the plan by name."""
    assert cli.main(["plan", *argv, "--json"]) in (0, 1)
    return {f["name"]: f for f in json.loads(capsys.readouterr().out)["formats"]}


def test_kv_tokens_of_an_h100_within_one_percent(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with SERVING.open(newline="") as f:
        rows = [r for r in csv.DictReader(f) if "decode_throughput" in r["command"] and r["format"] in FORMATS]
    rows = [r for r in rows if r["model"] == "llama-3.1-8b" and "--gpu-memory" not in r["command"]]
    assert {r["format"] for r in rows} == set(FORMATS)
    for row in (r for r in rows if "H100 80GB" in r["device"] and r["tensor_parallel"] == "1"):
        context = int(row["input_len"]) + int(row["output_len"]) + 16
        argv = f"--gpu 80GB --utilization 0.85 --batched-tokens 16k --weights 14.96GB --context {context}".split()
        got = planned([str(llama), *argv], capsys)[FORMATS[row["format"]]]["kv_tokens"]
        more = int(row["kv_tokens"]) / got - 1
        if "--requests full" in row["command"]:  # CUDA graphs of 8 or 9 sizes leave more memory than vLLM's usual ones
            assert 0 < more < 0.02, f"{row['format']}: {got}, vLLM {row['kv_tokens']}"
        else:
            assert abs(more) < 0.01, f"{row['format']}: {got}, vLLM {row['kv_tokens']}"


def test_speed_is_near_that_of_measured_steps(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with SERVING.with_name("step_profile.csv").open(newline="") as f:
        rows = [r for r in csv.DictReader(f) if r["model"] == "llama-3.1-8b" and r["format"] in FORMATS]
    assert len(rows) >= 2
    for r in rows:
        argv = f"--kv-memory 49.1GB --context {int(r['input_len']) + 40} --weights 14.96GB --users {r['users']}".split()
        row = planned([str(llama), *argv], capsys)[FORMATS[r["format"]]]
        assert row["running_users"] == int(r["users"]) and abs(row["decode_tok_s"] / float(r["tok_s"]) - 1) < 0.1


def test_measured_rows_are_near_the_speed_table() -> None:
    pytest.importorskip("scipy")
    from benchmarks.decode_fit import speed_table

    fitted, errors = speed_table()
    assert fitted.keys() == decode_speed.table().keys()
    assert {"bf16", "fp8", "kqsvd_d128_b82"} <= fitted["formats"].keys() & decode_speed.table()["formats"].keys()
    assert all(abs(e) < 0.35 for found in errors.values() for e in found.values())


def test_speed_between_and_beyond_measured_widths() -> None:
    time = [decode_speed.attention_time("x", bits).at(64, 8192, 1.0) for bits in (2.06, 2.56, 3.06, 4.06)]  # type: ignore[union-attr]
    assert time == sorted(time)
    assert decode_speed.attention_time("x", 8.0) is None
    assert decode_speed.tokens_per_second("x", 8.0, 1, 100, 1, 1, 1) is None
    assert decode_speed.tokens_per_second("bf16", 16.0, 0, 100, 1, 1, 1) is None  # nobody fits
