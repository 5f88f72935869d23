# SPDX-License-Identifier: Apache-2.0
"""Copy a Llama-like model with its KV heads padded to a multiple, the function unchanged.

    python -m benchmarks.pad_heads MODEL OUT --multiple 4

A model whose heads do not divide by the tensor-parallel size cannot be sharded (SmolLM2-135M has 3 KV heads). Padded
heads repeat the first ones, and their columns of the output projection are zero.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def pad_layer(weights: dict[str, torch.Tensor], prefix: str, heads: int, kv_heads: int, target: int, dim: int) -> None:
    """Pad one attention layer's projections in place."""
    group = heads // kv_heads
    extra = [i % kv_heads for i in range(kv_heads, target)]
    for name, per_kv in (("q_proj", group), ("k_proj", 1), ("v_proj", 1)):
        for kind in ("weight", "bias"):
            key = f"{prefix}.{name}.{kind}"
            if key in weights:
                w = weights[key]
                blocks = w.unflatten(0, (kv_heads, per_kv * dim))
                weights[key] = torch.cat([blocks, blocks[extra]]).flatten(0, 1).contiguous()
    key = f"{prefix}.o_proj.weight"
    zero = weights[key].new_zeros(weights[key].shape[0], (target - kv_heads) * group * dim)
    weights[key] = torch.cat([weights[key], zero], 1).contiguous()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--multiple", type=int, default=4)
    options = parser.parse_args()
    config = json.loads((options.model / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    target = -(-kv_heads // options.multiple) * options.multiple
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(options.model.glob("*.safetensors")):
        weights |= load_file(file)
    for i in range(config["num_hidden_layers"]):
        pad_layer(weights, f"model.layers.{i}.self_attn", heads, kv_heads, target, dim)
    options.out.mkdir(parents=True, exist_ok=True)
    for file in options.model.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
            shutil.copy(file, options.out / file.name)
    config |= {"num_attention_heads": heads // kv_heads * target, "num_key_value_heads": target, "head_dim": dim}
    (options.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(weights, options.out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
