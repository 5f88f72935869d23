# SPDX-License-Identifier: Apache-2.0
"""`kqsvd inspect`: what a projection holds, per layer and in total, as a table or as JSON."""

from __future__ import annotations

import argparse
import json
from typing import Any

from vllm_kqsvd.capacity import WINDOW, latent
from vllm_kqsvd.plan import SidePlan, layer_range

ELEMENT_SIZE = 2  # bytes of an uncompressed element (bf16)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("projection", help="projection folder")
    parser.add_argument("--model", help="also check that the projection belongs to this model folder")
    parser.add_argument(
        "--context", type=int, default=8192, metavar="N", help="tokens per sequence for the ratio (default 8192)"
    )
    parser.add_argument(
        "--window", type=int, default=WINDOW, metavar="W", help=f"exact recent tokens (default {WINDOW})"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the report; 0."""
    from vllm_kqsvd.errors import ConfigError
    from vllm_kqsvd.projection import load_projection

    if args.context < 1 or args.window < 0:
        raise ConfigError("--context must be at least 1 and --window at least 0")
    projection = load_projection(args.projection)
    if args.model:
        projection.check_model(args.model)
    data = report(projection, args.context, args.window)
    print(json.dumps(data, indent=2) if args.json else as_text(data))
    return 0


def bit_profile(plan: SidePlan) -> str:
    """Code width of every group of 16 latent channels, one digit each."""
    return "".join(map(str, plan.group_bits))


def report(projection: Any, context: int = 8192, window: int = WINDOW) -> dict[str, Any]:
    """Everything `inspect` shows, as JSON values. Bytes count all KV heads; per token unless named otherwise."""
    layers = []
    for i, e in sorted(projection.layers.items()):
        plan, dim = e.codec.plan, e.codec.head_dim
        layers.append(
            {
                "index": i,
                "name": e.name,
                "rope_mode": e.rope_mode,
                "rope_block": e.rope_block,
                "max_position": e.max_position,
                "basis": {"k": e.k_basis, "v": e.v_basis},
                "rank": {"k": plan.k.rank, "v": plan.v.rank},
                "group_bits": {"k": list(plan.k.group_bits), "v": list(plan.v.group_bits)},
                "bits_per_element": plan.bits_per_element(dim),
                "bytes_per_token": e.bytes_per_token,
                "bytes_per_token_bf16": 2 * ELEMENT_SIZE * e.codec.num_kv_heads * dim,
                "predicted_error": projection.predicted[i] if projection.predicted else None,
            }
        )
    model = projection.model
    return {
        "digest": projection.digest,
        "created_by": projection.created_by,
        "model": {
            "architecture": model.architecture,
            "num_layers": model.num_layers,
            "num_heads": model.num_heads,
            "num_kv_heads": model.num_kv_heads,
            "head_dim": model.head_dim,
            "rope": [r.describe() for r in model.rope],
            "weights_sha256": model.weights_sha256,
        },
        "calibration": projection.calibration,
        "layers": layers,
        "total": totals(layers, context, window),
    }


def totals(layers: list[dict[str, Any]], context: int, window: int) -> dict[str, Any]:
    """Sums over layers; `compression_ratio` counts scales and the blocks of a request's exact window."""
    used = sum(e["bytes_per_token"] for e in layers)
    plain = sum(e["bytes_per_token_bf16"] for e in layers)
    cache = latent("projection", used, plain // ELEMENT_SIZE, window, ELEMENT_SIZE)
    exact = cache.window_blocks * cache.block_bytes
    return {
        "bytes_per_token": used,
        "bytes_per_token_bf16": plain,
        "bits_per_element": 8 * ELEMENT_SIZE * used / plain,
        "bits_per_element_of_layers": [f(e["bits_per_element"] for e in layers) for f in (min, max)],
        "context": context,
        "window": window,
        "window_bytes_per_sequence": exact,
        "compression_ratio": plain * context / (used * context + exact),
        "compression_ratio_latent": plain / used,
    }


def as_text(data: dict[str, Any]) -> str:
    """The report as a table for people."""
    model, total = data["model"], data["total"]
    lines = [
        f"{model['architecture']}: {model['num_layers']} layers, {model['num_heads']} heads, "
        f"{model['num_kv_heads']} KV heads, head_dim {model['head_dim']}",
        *(f"{r}" for r in model["rope"]),
        f"digest {data['digest'][:16]}, written by vllm_kqsvd {data['created_by']}",
        "",
    ]
    head = ("layer", "mode", "T", "basis k/v", "k bits", "v bits", "B/token", "bits/elem", "predicted")
    lines += align([head, *(_row(e) for e in data["layers"])])
    lines += [
        "",
        "k bits, v bits: code width of each group of 16 latent channels; bits/elem with scales",
        f"{total['bytes_per_token']} bytes per token, {total['bytes_per_token_bf16']} in bf16: "
        f"{total['bits_per_element']:.2f} bits per element{layer_range(*total['bits_per_element_of_layers'])}",
        f"compression ratio {total['compression_ratio']:.2f} at {total['context']} tokens per sequence, exact window "
        f"of {total['window']} tokens counted ({total['compression_ratio_latent']:.2f} without it)",
    ]
    return "\n".join(lines)


def _row(e: dict[str, Any]) -> tuple[str, ...]:
    bits = {side: "".join(map(str, e["group_bits"][side])) for side in ("k", "v")}
    basis = "/".join(dict.fromkeys((e["basis"]["k"], e["basis"]["v"])))
    predicted = "-" if e["predicted_error"] is None else f"{e['predicted_error']:.2e}"
    mode, block = e["rope_mode"], str(e["rope_block"] or "-")
    size, width = str(e["bytes_per_token"]), f"{e['bits_per_element']:.2f}"
    return str(e["index"]), mode, block, basis, bits["k"], bits["v"], size, width, predicted


def align(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows of cells as lines of equal columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
