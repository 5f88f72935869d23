# SPDX-License-Identifier: Apache-2.0
"""Tiny random Llamas on disk, and projections for them whose coders are random but nearly lossless."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from tests.helpers import random_codec, side_plan
from vllm_kqsvd.codec import SideCodec
from vllm_kqsvd.plan import LayerPlan
from vllm_kqsvd.projection import LayerEntry, ModelFingerprint, Projection, save_projection

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


def write_projection(
    folder: Path, model: Path, bits: int = 8, rope_mode: str = "page", layers: int = LAYERS, head_dim: int = HEAD_DIM
) -> Path:
    """A projection folder for `model` with `bits` bits in every channel."""
    groups = side_plan(*[bits] * (head_dim // 16))
    block = {"page": 32, "pre": 1}.get(rope_mode, 0)
    fingerprint = ModelFingerprint.from_hf(model)
    entries = {}
    for i in range(layers):
        codec = random_codec(LayerPlan(groups, groups), KV_HEADS, head_dim, block, seed=i)
        codec = replace(codec, k=_faithful(codec.k), v=_faithful(codec.v), rope=fingerprint.rope[0].spec())
        position = 2048 if rope_mode == "post" else None
        entries[i] = LayerEntry(
            i, f"model.layers.{i}.self_attn", rope_mode, block, 0, position, "random", "random", codec
        )
    save_projection(Projection(fingerprint, entries), folder)
    return folder
