# SPDX-License-Identifier: Apache-2.0
"""The whole calibration on tiny models: every family, basis, rope mode; streaming, merging, resuming."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.calibration.conftest import make_model
from vllm_kqsvd.calibration import cli
from vllm_kqsvd.calibration.basis import BASES
from vllm_kqsvd.calibration.calibrate import (
    CalibrateOptions,
    calibrate,
    collect_statistics,
    partial_folder,
    project,
)
from vllm_kqsvd.calibration.capture import AttentionCall, load_model, observe
from vllm_kqsvd.calibration.collect import CollectOptions, Collector, before_rope
from vllm_kqsvd.calibration.corpus import Corpus
from vllm_kqsvd.calibration.model_probe import LayerInfo, probe
from vllm_kqsvd.calibration.reuse import solve_again
from vllm_kqsvd.calibration.statistics import Statistics
from vllm_kqsvd.errors import CalibrationError, ConfigError
from vllm_kqsvd.ops.reference import decode, encode
from vllm_kqsvd.ops.rope_block import rotate
from vllm_kqsvd.projection import Projection, load_projection, save_projection

SMALL = CollectOptions(
    num_windows=5, window_length=192, gradient_windows=2, gradient_length=160, samples=600, window=32
)
OPTIONS = CalibrateOptions(bits=4.0, collect=SMALL)
Collected = tuple[Statistics, list[LayerInfo], Corpus]


def sums(statistics: Statistics) -> dict[str, torch.Tensor]:
    return {f"{i}.{n}": t for i, layer in enumerate(statistics.layers) for n, t in layer.sums.items()}


def test_every_family_calibrates(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    projection = calibrate(tiny_model, [text_file], OPTIONS)
    save_projection(projection, tmp_path / "out")
    loaded = load_projection(tmp_path / "out")
    loaded.check_model(tiny_model)
    assert len(loaded.layers) == 2
    assert all(0 < p < 0.3 for p in loaded.predicted)
    assert {e.codec.plan.bytes_per_token for e in loaded.layers.values()} == {26}
    assert loaded.calibration["data"][0]["file"] == "words.txt"
    assert loaded.layers[0].rope_mode == "page"
    assert loaded.layers[0].rope_block == 32


def test_keys_survive_the_coder(llama: Path, text_file: Path) -> None:
    projection = calibrate(llama, [text_file], OPTIONS)
    model = load_model(str(llama), "cpu", torch.float32)
    calls: list[AttentionCall] = []
    ids = Corpus([text_file], tokenizer_of(llama), 192, seed=99).window(0)
    with torch.no_grad(), observe(calls.append):
        model.base_model(input_ids=torch.tensor([ids]), use_cache=False)
    for layer, call in zip(projection.layers.values(), calls, strict=True):
        at = torch.arange(192)
        turned = before_rope(call.k, layer.codec.rope).transpose(0, 1)
        x = rotate(turned, at % 32, layer.codec.rope)
        for y, side in ((x, layer.codec.k), (call.v.transpose(0, 1), layer.codec.v)):
            error = decode(*encode(y, at, side), at, side) - y
            assert error.norm() < 0.4 * y.norm()  # 3 bits of white noise


def test_kept_statistics_serve_other_budgets(llama: Path, text_file: Path, tmp_path: Path) -> None:
    def run(output: str, *arguments: str) -> Projection:
        parser = argparse.ArgumentParser()
        cli.add_arguments(parser)
        sizes = "--num-windows 5 --window-length 192 --gradient-windows 2 --gradient-length 160 --samples 600".split()
        cli.run(parser.parse_args([str(llama), "--output", str(tmp_path / output), *sizes, *arguments]))
        return load_projection(tmp_path / output)

    kept = tmp_path / "moments.safetensors"
    first = run("four", "--bits", "4", "--data", str(text_file), "--keep-statistics", str(kept))
    same, fewer = (run(f"cut{b}", "--bits", b, "--statistics", str(kept)) for b in ("4", "3"))
    assert torch.equal(first.layers[0].codec.k.encode, same.layers[0].codec.k.encode)
    assert first.calibration == same.calibration
    assert fewer.calibration["bits"] == 3.0
    assert not list(tmp_path.glob(".*partial*"))
    other = make_model(tmp_path / "other", "llama", heads=2, kv_heads=1)
    with pytest.raises(CalibrationError, match="another model"):
        solve_again(other, kept, OPTIONS)


def tokenizer_of(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def test_statistics_stream_merge_and_equal_a_batch(llama: Path, text_file: Path) -> None:
    model = load_model(str(llama), "cpu", torch.float32)
    layers = probe(model)
    corpus = Corpus([text_file], tokenizer_of(llama), SMALL.window_length)
    collector = Collector(model, layers, corpus, SMALL)
    assert (SMALL.moment_windows, collector.num_steps) == (4, 6)
    whole = collector.run(collector.start({}), range(6))
    parts = [collector.run(collector.start({}), steps) for steps in (range(0, 3), range(3, 6))]
    parts[0].merge(parts[1])
    assert parts[0].steps_done == 6
    for name, value in sums(whole).items():
        assert torch.allclose(sums(parts[0])[name], value, rtol=1e-12), name
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        for i in range(6):
            calls: list[AttentionCall] = []
            ids = corpus.window(i)[: SMALL.window_length if i < 4 else SMALL.gradient_length]
            with observe(calls.append):
                model.base_model(input_ids=torch.tensor([ids]), use_cache=False)
            seen.append(before_rope(calls[1].k, layers[1].rope).double())
    batch = torch.cat([x[:, 4:] for x in seen], 1)
    got = whole.layers[1]
    if not bool((got.sums["k_sink_count"] > 0).any()):
        assert torch.allclose(got.second_moment("k"), batch.mT @ batch / batch.shape[1], rtol=1e-6, atol=1e-6)
        assert torch.allclose(got.mean("k"), batch.mean(1), rtol=1e-6, atol=1e-7)


def test_windows_at_once_change_no_bit(llama: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", torch._C.set_num_threads)  # vLLM, once run here, ignores the call
    model = load_model(str(llama), "cpu", torch.float32)
    corpus = Corpus([text_file], tokenizer_of(llama), SMALL.window_length)
    collector = Collector(model, probe(model), corpus, SMALL)
    threads, found = torch.get_num_threads(), []
    try:
        for parallel in (1, 3):
            torch.set_num_threads(parallel)
            found.append(sums(collector.run(collector.start({}), range(collector.num_steps))))
            assert torch.get_num_threads() == parallel
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_chunked_logits_give_the_gradients_of_whole_ones(llama: Path, text_file: Path) -> None:
    model = load_model(str(llama), "cpu", torch.float32)
    collector = Collector(model, probe(model), Corpus([text_file], tokenizer_of(llama), SMALL.window_length), SMALL)
    assert collector._plain_head is model.get_output_embeddings()
    chunked = sums(collector.run(collector.start({}), range(4, 6)))
    collector.__dict__["_plain_head"] = None
    whole = sums(collector.run(collector.start({}), range(4, 6)))
    for name in (n for n in whole if n.endswith("grad_gram")):
        assert torch.allclose(chunked[name], whole[name], rtol=1e-3, atol=1e-6 * float(whole[name].abs().max())), name


def test_an_interrupted_run_resumes_to_the_same_bytes(
    llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = calibrate(llama, [text_file], OPTIONS, output=tmp_path / "whole")
    monkeypatch.setattr("vllm_kqsvd.calibration.collect._SAVE_SECONDS", -1.0)
    step = Collector._gradients

    def killed(self: Collector, statistics: Statistics, index: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Collector, "_gradients", killed)
    with pytest.raises(KeyboardInterrupt):
        calibrate(llama, [text_file], OPTIONS, output=tmp_path / "cut")
    monkeypatch.setattr(Collector, "_gradients", step)
    moments = Collector._moments
    monkeypatch.setattr(Collector, "_moments", lambda *a: pytest.fail("moments were collected again"))
    resumed = calibrate(llama, [text_file], OPTIONS, output=tmp_path / "cut", resume=True)
    monkeypatch.setattr(Collector, "_moments", moments)
    digests = [save_projection(p, tmp_path / n) for p, n in ((whole, "whole"), (resumed, "cut"))]
    assert digests[0] == digests[1]
    assert (tmp_path / "whole" / "kqsvd.safetensors").read_bytes() == (
        tmp_path / "cut" / "kqsvd.safetensors"
    ).read_bytes()
    other = dataclasses.replace(OPTIONS, collect=dataclasses.replace(SMALL, seed=1))
    with pytest.raises(CalibrationError, match="other options"):
        calibrate(llama, [text_file], other, output=tmp_path / "cut", resume=True)


@pytest.fixture(scope="module")
def collected(llama: Path, text_file: Path) -> Collected:
    return collect_statistics(llama, [text_file], OPTIONS)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("basis", BASES)
def test_every_basis_writes_a_loadable_file(
    llama: Path, collected: Collected, basis: str, center: bool, tmp_path: Path
) -> None:
    statistics, layers, corpus = collected
    options = dataclasses.replace(OPTIONS, basis=basis, center=center)
    save_projection(project(llama, layers, statistics, corpus, options), tmp_path / "p")
    entry = load_projection(tmp_path / "p").layers[1]
    assert entry.k_basis == basis
    assert bool(entry.codec.k.mean.any()) == center


@pytest.mark.parametrize(("mode", "block", "offsets"), [("page", 32, 32), ("pre", 1, 1), ("post", 0, 1)])
def test_every_rope_mode(
    llama: Path, collected: Collected, mode: str, block: int, offsets: int, tmp_path: Path
) -> None:
    statistics, layers, corpus = collected
    options = dataclasses.replace(OPTIONS, rope_mode=mode)
    save_projection(project(llama, layers, statistics, corpus, options), tmp_path / "p")
    entry = load_projection(tmp_path / "p").layers[0]
    assert (entry.rope_mode, entry.rope_block) == (mode, block)
    assert entry.codec.k.mean_basis.shape[0] == offsets
    assert entry.max_position == (512 if mode == "post" else None)


def test_rope_mode_none_needs_a_model_without_rope(llama: Path, collected: Collected) -> None:
    statistics, layers, corpus = collected
    with pytest.raises(CalibrationError, match="has RoPE"):
        project(llama, layers, statistics, corpus, dataclasses.replace(OPTIONS, rope_mode="none"))


def test_without_backward(llama: Path, text_file: Path) -> None:
    options = dataclasses.replace(OPTIONS, collect=dataclasses.replace(SMALL, backward=False))
    projection = calibrate(llama, [text_file], options)
    assert projection.calibration["gradients"] == "local"


def arguments(*extra: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args(list(extra))


def test_command_writes_a_folder_and_cleans_up(
    llama: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "proj"
    args = arguments(
        str(llama), "--output", str(out), "--data", str(text_file), "--ratio", "4x", "--num-windows", "4",
        "--window-length", "160", "--gradient-windows", "2", "--samples", "400", "--exact-window", "32",
    )  # fmt: skip
    assert cli.run(args) == 0
    assert "bits per element with scales" in capsys.readouterr().out
    assert load_projection(out).compression_ratio() >= 4
    assert not partial_folder(out).exists()


def test_command_refuses_nonsense(llama: Path, text_file: Path, tmp_path: Path) -> None:
    base = ["--output", str(tmp_path / "p"), "--data", str(text_file)]
    with pytest.raises(CalibrationError, match="not a Hugging Face model folder"):
        cli.run(arguments(str(tmp_path), *base))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").touch()
    with pytest.raises(CalibrationError, match="holds other files"):
        cli.run(arguments(str(llama), "--output", str(foreign), "--data", str(text_file)))
    (tmp_path / "file").touch()
    with pytest.raises(CalibrationError, match="cannot save the growing statistics"):
        calibrate(llama, [text_file], OPTIONS, output=tmp_path / "file" / "p")
    with pytest.raises(ConfigError, match="not a number"):
        cli.run(arguments(str(llama), *base, "--ratio", "fast"))
    with pytest.raises(CalibrationError, match="does not exist"):
        calibrate(llama, [tmp_path / "none.txt"], OPTIONS)


@pytest.mark.parametrize("factor", [5.0, 40.0])
def test_tokens_far_out_of_the_calibrated_range_are_not_clipped(
    llama: Path, collected: Collected, factor: float
) -> None:
    statistics, layers, corpus = collected
    codec = project(llama, layers, statistics, corpus, OPTIONS).layers[1].codec
    at = torch.arange(64) % 32
    for name, side in (("k", codec.k), ("v", codec.v)):
        basis = side.mean_basis[at] if name == "k" else side.mean_basis.expand(64, -1)
        mean = torch.einsum("nm,hmd->nhd", basis, side.mean)
        x = statistics.layers[1].tokens(name)[:64]
        x = rotate(x, at, codec.rope) if name == "k" else x
        spike = mean + torch.zeros_like(x)  # everything in the strongest latent channel, which has the most bits
        spike += factor * 3 * side.decode[:, 0] / side.scale_weight[:, :1].sqrt().clamp_min(1e-6)
        for token, bound in ((mean + factor * (x - mean), 0.75), (spike, 0.6)):
            back = decode(*encode(token, at, side), at, side)
            error = (back - token).norm(dim=-1) / (token - mean).norm(dim=-1).clamp_min(1e-6)
            assert float(error.max()) < bound, (name, float(error.max()))
