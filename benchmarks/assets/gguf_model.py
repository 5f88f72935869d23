# SPDX-License-Identifier: Apache-2.0
"""GGUF file -> Hugging Face model folder (config, bf16 safetensors, tokenizer, chat template).

Llama and Qwen2 decoders. Weights are dequantized 4 to 6 bit values, not the original checkpoint: compare a
compressed run only with the same folder's own bf16 run.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save_file

from benchmarks.assets.gguf_tokenizer import write_tokenizer

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
BLOCK_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
BLOCK_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


class Header:
    """The GGUF key-value header, and the shapes the model's config needs."""

    def __init__(self, reader: GGUFReader) -> None:
        self._fields = reader.fields
        self.arch: str = self.get("general.architecture")
        if self.arch not in ARCHITECTURES:
            raise ValueError(f"GGUF architecture {self.arch!r} is unknown; known are {sorted(ARCHITECTURES)}")
        self.num_heads: int = self.model("attention.head_count")
        self.num_kv_heads: int = self.model("attention.head_count_kv")
        self.hidden_size: int = self.model("embedding_length")
        self.num_layers: int = self.model("block_count")
        self.context_length: int = self.model("context_length")
        self.head_dim: int = self.hidden_size // self.num_heads
        if "attention.key_length" in {key.removeprefix(self.arch + ".") for key in self._fields}:
            self.head_dim = self.model("attention.key_length")

    def get(self, key: str) -> Any:
        if key not in self._fields:
            raise ValueError(f"GGUF header has no {key!r}")
        return self._fields[key].contents()

    def model(self, key: str) -> Any:
        return self.get(f"{self.arch}.{key}")

    def token(self, key: str) -> Any:
        return self.get(f"tokenizer.ggml.{key}")


def _target_name(name: str) -> str:
    """Hugging Face name of a GGUF tensor."""
    if name in ("token_embd.weight", "output.weight"):  # tied: `output.weight`, where present, is the finer copy
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    match = BLOCK_NAME.fullmatch(name)
    if match is None or match[2] not in BLOCK_MODULES:
        raise ValueError(f"GGUF tensor {name!r} has no place in a tied Llama or Qwen2 decoder")
    return f"model.layers.{match[1]}.{BLOCK_MODULES[match[2]]}.{match[3]}"


def _half_split_rope(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of q or k from adjacent rotary pairs (llama.cpp's order for Llama) to split halves (Hugging Face's)."""
    pairs = weight.unflatten(0, (num_heads, -1, 2))  # [heads, head_dim / 2, 2, ...]
    return pairs.transpose(1, 2).reshape(weight.shape)


def read_weights(reader: GGUFReader, header: Header, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """State dict under Hugging Face names."""
    names = {tensor.name for tensor in reader.tensors}
    weights = {}
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight" or (tensor.name == "token_embd.weight" and "output.weight" in names):
            continue
        weight = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        target = _target_name(tensor.name)
        if header.arch == "llama" and (".q_proj." in target or ".k_proj." in target):
            weight = _half_split_rope(weight, header.num_heads if ".q_proj." in target else header.num_kv_heads)
        weights[target] = weight.to(dtype).contiguous()
    return weights


def model_config(header: Header, vocab_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """The content of config.json."""
    theta = float(header.model("rope.freq_base"))
    extra = (
        {"attention_bias": False, "mlp_bias": False}
        if header.arch == "llama"
        else {"use_sliding_window": False, "sliding_window": None, "max_window_layers": header.num_layers}
    )
    return {
        "architectures": [ARCHITECTURES[header.arch]],
        "model_type": header.arch,
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": vocab_size,
        "hidden_size": header.hidden_size,
        "intermediate_size": header.model("feed_forward_length"),
        "num_hidden_layers": header.num_layers,
        "num_attention_heads": header.num_heads,
        "num_key_value_heads": header.num_kv_heads,
        "head_dim": header.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": header.context_length,
        # GGUF holds a float32: 1e-5 reads back as 9.99...e-06.
        "rms_norm_eps": float(f"{header.model('attention.layer_norm_rms_epsilon'):.1e}"),
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": True,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": header.token("bos_token_id"),
        "eos_token_id": header.token("eos_token_id"),
        "pad_token_id": header.token("padding_token_id"),
        **extra,
    }


def convert(gguf: Path, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the model of `gguf` into the existing, empty `folder`. Raises ValueError for an unknown architecture."""
    reader = GGUFReader(gguf)
    header = Header(reader)
    weights = read_weights(reader, header, dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = model_config(header, weights["model.embed_tokens.weight"].shape[0], dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    stops = [config["eos_token_id"]] + ([config["bos_token_id"]] if header.arch == "qwen2" else [])
    generation = {k: config[k] for k in ("bos_token_id", "pad_token_id")} | {"eos_token_id": stops}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    write_tokenizer(header.token, header.get("tokenizer.chat_template"), folder, header.context_length)
