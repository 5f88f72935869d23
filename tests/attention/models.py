# SPDX-License-Identifier: Apache-2.0
"""Tiny random Llamas on disk, and projections for them whose coders are random but nearly lossless."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from tests.helpers import random_codec, side_plan
from vllm_kqsvd.codec import SideCodec
from vllm_kqsvd.plan import LayerPlan
from vllm_kqsvd.projection import (
    LayerEntry,
    ModelFingerprint,
    Projection,
    load_projection,
    rope_settings,
    save_projection,
)

LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 3, 4, 2, 64, 512


def write_model(folder: Path, **overrides: object) -> Path:
    """A saved random Llama with enough attention in it that a wrong cache changes its tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    options = {
        "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
        "max_position_embeddings": 2048, "initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    config = LlamaConfig(**{**options, **overrides})
    LlamaForCausalLM(config).float().save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Words `w0` to `w511` and a chat template that only joins the contents."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w2"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="w0", eos_token="w1", unk_token="w2")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)


def _faithful(side: SideCodec) -> SideCodec:
    """The side with equal steps, a small mean and a scale that never clips: 8 bits lose less than 1 %."""
    basis = side.decode / side.decode.norm(dim=-1, keepdim=True)
    return replace(
        side,
        encode=basis.transpose(1, 2).contiguous(),
        decode=basis,
        scale_weight=torch.zeros_like(side.scale_weight),
        guard_weight=torch.full_like(side.guard_weight, 1 / (2.0 ** (side.plan.group_bits[0] - 1) - 1)),
        mean=0.02 * side.mean,
    )


def write_gemma3(folder: Path, layer_types: str = "ssfssf", **overrides: object) -> Path:
    """A saved random Gemma-3 text model; `layer_types`: s for a sliding window of 48, f for the whole context."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    kinds = {"s": "sliding_attention", "f": "full_attention"}
    options = {
        "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": len(layer_types),
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "sliding_window": 48,
        "layer_types": [kinds[x] for x in layer_types], "query_pre_attn_scalar": HEAD_DIM,
        "max_position_embeddings": 2048, "initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    Gemma3ForCausalLM(Gemma3TextConfig(**{**options, **overrides})).float().save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_qwen3_next(folder: Path) -> Path:
    """A saved random Qwen3-Next: three layers of linear attention, then one of the whole context."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=128, linear_value_head_dim=128, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=64, shared_expert_intermediate_size=64, max_position_embeddings=2048,
        initializer_range=0.1, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    Qwen3NextForCausalLM(config).float().save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_adapter(folder: Path, rank: int = 8) -> Path:
    """A random LoRA adapter of the keys, values and queries of `write_model`'s Llama."""
    import json

    from safetensors.torch import save_file

    gen = torch.Generator().manual_seed(5)
    wide = {"q_proj": HEADS * HEAD_DIM, "k_proj": KV_HEADS * HEAD_DIM, "v_proj": KV_HEADS * HEAD_DIM}
    tensors = {}
    for layer in range(LAYERS):
        for name, out in wide.items():
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{at}.lora_A.weight"] = 0.1 * torch.randn(rank, 128, generator=gen)
            tensors[f"{at}.lora_B.weight"] = 0.1 * torch.randn(out, rank, generator=gen)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(wide), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "task_type": "CAUSAL_LM"}))
    return folder


def write_projection(
    folder: Path,
    model: Path,
    bits: int = 8,
    rope_mode: str = "page",
    layers: int | list[int] = LAYERS,
) -> Path:
    """A projection folder for `model` with `bits` bits in every channel of these layers."""
    from transformers import AutoConfig

    fingerprint = ModelFingerprint.from_hf(model)
    groups = side_plan(*[bits] * (fingerprint.head_dim // 16))
    block = {"page": 32, "pre": 1}.get(rope_mode, 0)
    rope_of = rope_settings(AutoConfig.from_pretrained(model))[1]
    entries = {}
    for i in range(layers) if isinstance(layers, int) else layers:
        codec = random_codec(LayerPlan(groups, groups), fingerprint.num_kv_heads, fingerprint.head_dim, block, seed=i)
        rope = rope_of[i] or 0
        codec = replace(codec, k=_faithful(codec.k), v=_faithful(codec.v), rope=fingerprint.rope[rope].spec())
        position = 2048 if rope_mode == "post" else None
        entries[i] = LayerEntry(
            i, f"model.layers.{i}.self_attn", rope_mode, block, rope, position, "random", "random", codec
        )
    save_projection(Projection(fingerprint, entries), folder)
    return folder


def write_unequal(folder: Path, rich: Path, lean: Path) -> Path:
    """The projection `rich` with the middle one of its three layers from `lean`: layers of unequal bytes."""
    first, second = load_projection(rich), load_projection(lean)
    save_projection(replace(first, layers={**first.layers, 1: second.layers[1]}), folder)
    return folder


def write_quantized(folder: Path, model: Path, dtype: torch.dtype) -> Path:
    """The Llama of `write_model` with 8-bit weights (int8 or float8_e4m3fn) per channel, as compressed-tensors."""
    import json
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    most = 127.0 if dtype == torch.int8 else 448.0
    tensors = {}
    for name, weight in load_file(model / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = weight
            continue
        scale = weight.abs().amax(1, keepdim=True) / most
        scaled = weight / scale
        tensors[name] = (scaled.round() if dtype == torch.int8 else scaled).to(dtype)
        tensors[name + "_scale"] = scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    kind = "int" if dtype == torch.int8 else "float"
    eight = {"num_bits": 8, "type": kind, "symmetric": True}
    scheme = {
        "targets": ["Linear"],
        "weights": {**eight, "strategy": "channel", "dynamic": False},
        "input_activations": {**eight, "strategy": "token", "dynamic": True},
    }
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": f"{kind}-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": scheme}, "ignore": ["lm_head"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder
