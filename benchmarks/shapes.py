# SPDX-License-Identifier: Apache-2.0
"""Model folders with published dimensions and no weights (`--load-format dummy`), and random projections for them.

Speed does not depend on what the weights or bases are, only on their shapes.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from vllm_kqsvd.codec import MEAN_RANK, LayerCodec, SideCodec
from vllm_kqsvd.ops.rope_block import RopeSpec
from vllm_kqsvd.plan import LayerPlan, SidePlan
from vllm_kqsvd.plan_catalog import PLANS

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "attention_bias": False,
    "mlp_bias": False,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
SHAPES = {
    "llama-3.1-8b": dict(
        LLAMA,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    ),
    # 70B layers, as many as one 80 GB GPU holds beside a cache: the one-GPU side of a scaling figure
    "llama-3.1-70b-24-layers": dict(
        LLAMA,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=24,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
    ),
    "llama-3.2-1b": dict(
        LLAMA,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
    ),
    # small enough that a CPU core shows what a cache admits rather than what it computes
    "toy-4-layers": dict(
        LLAMA,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        vocab_size=49152,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
# named width -> plan of the decode kernels' catalogue
PLANS_BY_BITS = {4.0: "d128_b130", 3.0: "d128_b98", 2.5: "d128_b82", 2.0: "d128_b66"}


def model_folder(name: str, root: Path) -> Path:
    """Write `config.json` of a known shape under `root` and return its folder."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[name], indent=1))
    return folder


def write_word_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a tokenizer in which every id is a word of its own.

    Random weights repeat any token they like. In a published tokenizer that may be half a character, or no token, and
    vLLM then decodes the whole answer again for every token, in the one thread of the server, in hope of its end.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def random_side(plan: SidePlan, heads: int, dim: int, offsets: int, gen: torch.Generator) -> SideCodec:
    """A coder with orthonormal random bases and unit-variance ranges."""
    basis = torch.linalg.qr(torch.randn(heads, dim, dim, generator=gen))[0][..., : plan.rank]
    step = 3.2 / 2.0 ** torch.tensor(plan.group_bits).repeat_interleave(16)
    width = MEAN_RANK if offsets > 1 else 1
    mean = 0.1 * torch.randn(heads, width, dim, generator=gen)
    return SideCodec(
        plan,
        basis / step,
        (basis * step).transpose(1, 2).contiguous(),
        (step.square() / plan.rank).expand(heads, -1).contiguous(),
        torch.zeros(heads, plan.rank),
        torch.randn(offsets, width, generator=gen),
        mean,
        mean.clone(),
    )


def random_codec(config: dict, plan: LayerPlan, rope: RopeSpec, rope_block: int, seed: int) -> LayerCodec:
    """A page-mode codec for one layer of a model config."""
    gen = torch.Generator().manual_seed(seed)
    heads, dim = config["num_key_value_heads"], config["head_dim"]
    k = random_side(plan.k, heads, dim, rope_block, gen)
    return LayerCodec(k, random_side(plan.v, heads, dim, 1, gen), rope, rope_block)


def plan_of(bits: float) -> LayerPlan:
    """The benchmark plan of a named width."""
    return PLANS[PLANS_BY_BITS[bits]][1]
