# SPDX-License-Identifier: Apache-2.0
"""`kqsvd verify` on a tiny random model: windows, scores, verdict, exit code, refusals."""

from __future__ import annotations

import argparse
import json
import math
import random
from dataclasses import replace

import pytest
import torch

from tests.helpers import random_codec, side_plan
from vllm_kqsvd import verify as command
from vllm_kqsvd.errors import ConfigError, ProjectionFileError
from vllm_kqsvd.plan import LayerPlan
from vllm_kqsvd.projection import LayerEntry, ModelFingerprint, Projection, save_projection
from vllm_kqsvd.verify_harness import ProjectionCodec, ReadRule, Reference, Score, score
from vllm_kqsvd.verify_result import Fidelity, default_threshold
from vllm_kqsvd.verify_text import text_windows

LAYERS, HEADS, DIM = 2, 2, 32


def write_model(folder, architecture: str = "Llama") -> None:
    """A random two-layer model with a byte tokenizer."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=HEADS, head_dim=DIM, max_position_embeddings=512, initializer_range=0.3,
    )  # fmt: skip
    getattr(transformers, f"{architecture}ForCausalLM")(config).save_pretrained(folder)


def write_projection(model, folder, calibration: dict) -> None:
    """Random bases for the tiny model."""
    fingerprint, plan = ModelFingerprint.from_hf(model), LayerPlan(side_plan(8, 8), side_plan(8, 8))
    layers = {}
    for i in range(LAYERS):
        codec = replace(random_codec(plan, HEADS, DIM, seed=i), rope=fingerprint.rope[0].spec())
        layers[i] = LayerEntry(i, f"model.layers.{i}.self_attn", "page", 32, 0, None, "random", "random", codec)
    save_projection(Projection(fingerprint, layers, calibration, [0.1] * LAYERS), folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, a projection and a text."""
    folder = tmp_path_factory.mktemp("verify")
    write_model(folder / "model")
    write_projection(folder / "model", folder / "projection", {"data": "none"})
    words = random.Random(0).choices("the cache holds latents of old tokens and rows of new ones".split(), k=2000)
    (folder / "text.txt").write_text("\n".join(" ".join(words[i : i + 12]) for i in range(0, 2000, 12)))
    return folder


def run(place, *options: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    required = [str(place / "model"), str(place / "projection"), "--data", str(place / "text.txt")]
    return command.run(parser.parse_args([*required, "--context", "256", "--device", "cpu", *options]))


def test_command_prints_a_verdict_and_exits_by_threshold(place, capsys):
    assert run(place, "--threshold", "1e9") == 0
    assert "PASS" in capsys.readouterr().out
    assert run(place, "--threshold", "1e-12", "--plot", str(place / "plot.png")) == 1
    out = capsys.readouterr().out
    assert "FAIL" in out and "relative logit error" in out and "bits per element" in out
    assert (place / "plot.png").stat().st_size > 1000


def test_json_says_everything(place, capsys):
    run(place, "--json", "--chunk", "32", "--windows", "3")
    data = json.loads(capsys.readouterr().out)
    assert data["kl"] > 0 and 0 <= data["top1"] <= 1 and data["chunk"] == 32
    assert data["texts"][0]["windows"] == 3 and data["texts"][0]["positions"] == 3 * 63
    assert data["bits"] == pytest.approx(8 + 8 / DIM)
    assert set(data["logit_error"]) == {"0", "1"} and data["predicted"] == {"0": 0.1, "1": 0.1}
    assert data["passed"] == (data["kl"] <= data["threshold"]) and data["verdict"]


def test_text_used_for_calibration_is_refused(place, tmp_path):
    import hashlib

    digest = hashlib.sha256((place / "text.txt").read_bytes()).hexdigest()
    write_projection(place / "model", tmp_path / "seen", {"data": [{"file": "text.txt", "sha256": digest}]})
    with pytest.raises(ConfigError, match="used for calibration"):
        command.verify(place / "model", tmp_path / "seen", [place / "text.txt"])


def test_projection_of_another_model_is_refused(place, tmp_path):
    write_model(tmp_path / "other", "Qwen2")
    with pytest.raises(ProjectionFileError, match="another model"):
        command.verify(tmp_path / "other", place / "projection", [place / "text.txt"])


def test_unusable_text_is_refused(place, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    for data, match in ((tmp_path / "empty.txt", "empty"), (tmp_path / "none.txt", "cannot read")):
        with pytest.raises(ConfigError, match=match):
            command.verify(place / "model", place / "projection", [data])
    with pytest.raises(ConfigError, match="too short"):
        command.verify(place / "model", place / "projection", [place / "text.txt"], context=9000, windows=2)


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Qwen3", "Mistral"])
@pytest.mark.parametrize("chunk,prefill", [(1, 96), (32, 0)])
def test_an_exact_codec_changes_nothing(architecture, chunk, prefill, tmp_path):
    class Exact:
        name, group_tokens = "exact", 1

        def roundtrip(self, layer, key, value, positions):
            return key, value

    write_model(tmp_path, architecture)
    model, tokenizer = command.load_model(tmp_path, "cpu", torch.float32)
    (window,) = text_windows("some held-out text " * 20, "t", tokenizer, 128, 1, 32)
    found = score(model, window, Reference(model, window), Exact(), ReadRule(16, chunk=chunk, prefill=prefill))
    assert float(found.kl.abs().max()) < 1e-6 and found.kl.numel() == 31
    assert found.logit_error == {0: 0.0, 1: 0.0}
    none = score(
        model, window, Reference(model, window), ProjectionCodec({}), ReadRule(16, chunk=chunk, prefill=prefill)
    )
    assert float(none.kl.abs().max()) < 1e-6 and none.logit_error == {}


def test_windows_do_not_overlap_and_cover_the_text(place):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    text = (place / "text.txt").read_text()
    windows = text_windows(text, "t", tokenizer, 1000, 5, 100)
    starts = [text.index(tokenizer.decode(w.tokens)) for w in windows]
    assert all(b - a >= 1000 for a, b in zip(starts, starts[1:], strict=False)) and starts[-1] > len(text) // 2
    assert all(w.first_scored == 900 and w.tokens.numel() == 1000 for w in windows)


def test_pooled_figures_and_thresholds():
    kl = torch.tensor([0.0, 0.2], dtype=torch.float64)
    one = Score(kl, kl + 1, kl * 0 + 1, torch.tensor([1.0, 0.0], dtype=torch.float64))
    two = Score(3 * kl, kl + 1, kl * 0 + 1, torch.tensor([1.0, 1.0], dtype=torch.float64))
    both = Fidelity.of("t", [one, two])
    assert both.kl == pytest.approx(0.2) and both.kl_se == pytest.approx(0.1) and both.top1 == 0.75
    assert both.perplexity == pytest.approx(math.exp(1.1)) and both.perplexity_exact == pytest.approx(math.e)
    assert Fidelity.of("t", [one]).kl_se is None
    assert default_threshold(4.0) == 0.004 and default_threshold(3.0) == 0.012
    assert 0.004 < default_threshold(3.5) < 0.012 and default_threshold(1.0) == 0.06
