# SPDX-License-Identifier: Apache-2.0
"""`kqsvd plan`: tokens and users that fit in a GPU's memory, and decode speed, in bf16, fp8 and latent formats."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_kqsvd import decode_speed
from vllm_kqsvd.capacity import WINDOW, CacheFormat, latent, plain, plan_bytes
from vllm_kqsvd.config import MIN_WINDOW, TILE
from vllm_kqsvd.errors import ConfigError, UnsupportedError
from vllm_kqsvd.gpu_memory import BATCHED_TOKENS, MAX_SEQS, UTILIZATION, overhead, usable
from vllm_kqsvd.inspect_projection import align

BITS = (4.0, 3.0, 2.5, 2.0)  # the presets balanced, compact, capacity, extreme
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def size(text: str) -> int:
    """Bytes of "80GB", "1.5 GiB" or "32k"; units are powers of 1024, as GPU memory is sold."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text.lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 80GB or 32k")
    return int(float(match[1]) * _UNITS[match[2]])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("model", help="Hugging Face model folder; its weights are needed only for their size")
    parser.add_argument("--gpu", type=size, default=size("80GB"), metavar="SIZE", help="memory of a GPU (80GB)")
    parser.add_argument("--context", type=size, default=size("32k"), metavar="N", help="tokens per user (32k)")
    parser.add_argument("--users", type=int, metavar="N", help="say for each format whether so many users fit")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="tensor parallel ranks (1)")
    parser.add_argument("--projection", help="also plan with this projection")
    parser.add_argument("--window", type=int, default=WINDOW, metavar="W", help=f"exact recent tokens ({WINDOW})")
    parser.add_argument("--weights", type=size, metavar="SIZE", help="bytes of all weights (default: of the files)")
    parser.add_argument("--utilization", type=float, default=UTILIZATION,
                        help=f"vLLM's --gpu-memory-utilization ({UTILIZATION})")  # fmt: skip
    parser.add_argument("--batched-tokens", type=size, default=BATCHED_TOKENS, metavar="N",
                        help=f"vLLM's --max-num-batched-tokens ({BATCHED_TOKENS})")  # fmt: skip
    parser.add_argument("--max-num-seqs", type=size, default=MAX_SEQS, metavar="N",
                        help=f"vLLM's --max-num-seqs ({MAX_SEQS})")  # fmt: skip
    parser.add_argument("--overhead", type=size, metavar="SIZE",
                        help="activations, sampler and CUDA graphs on each GPU (estimated)")  # fmt: skip
    parser.add_argument("--kv-memory", type=size, metavar="SIZE", help="bytes of the cache, instead of the above")
    parser.add_argument("--plot", metavar="PNG", help="write a bar chart")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the plan; 0, or 1 if --users is given and no format serves so many."""
    data = plan(args)
    if args.plot:
        _plot(data, Path(args.plot))
    print(json.dumps(data, indent=2) if args.json else _text(data))
    return int(args.users is not None and not any(f["fits"] for f in data["formats"]))


def plan(args: argparse.Namespace) -> dict[str, Any]:
    """Everything the verb shows, as JSON values. Raises ConfigError or UnsupportedError."""
    _check(args)
    config = _config(args.model)
    heads, dim, layers = _shape(config, args.tp)
    local = max(1, heads // args.tp)
    elements = 2 * layers * local * dim
    weights = args.weights if args.weights is not None else _weights(args.model)
    memory = args.kv_memory if args.kv_memory is not None else _kv_memory(args, config, weights)
    formats = [plain("bf16", elements, 2), plain("fp8", elements, 1)]
    for bits in BITS:
        per_head = plan_bytes(bits, dim)
        name = f"kqsvd {bits:g} bits"
        formats.append(latent(name, layers * local * per_head, elements, args.window))
    if args.projection:
        from vllm_kqsvd.projection import load_projection

        projection = load_projection(args.projection)
        projection.check_model(config)
        total = projection.bytes_per_token * local // heads
        formats.append(latent("this projection", total, elements, args.window))
    rank = _Rank(memory, args.context, args.users, layers, elements // layers, weights // args.tp)
    return {
        "kv_memory": memory,
        "context": args.context,
        "model_context": getattr(_text_config(config), "max_position_embeddings", None),
        "tensor_parallel": args.tp,
        "window": args.window,
        "users": args.users,
        "speed_measured_on": {k: decode_speed.table()[k] for k in ("device", "date", "versions")},
        "formats": [_row(f, formats[0], rank) for f in formats],
    }


@dataclass(frozen=True)
class _Rank:
    """What a row is made for: the cache's bytes, the load, and the model's part on one GPU."""

    memory: int
    context: int
    users: int | None
    layers: int
    elements: int  # K and V of a token and layer
    weights: int


def _check(args: argparse.Namespace) -> None:
    """Raise ConfigError for numbers that no server would take."""
    for name in ("gpu", "context", "users", "tp", "batched_tokens", "max_num_seqs"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if not 0 < args.utilization <= 1:
        raise ConfigError(f"--utilization is {args.utilization}; it is a share, above 0 and at most 1")
    if args.window < MIN_WINDOW or args.window % TILE:
        raise ConfigError(
            f"--window is {args.window}; the plugin takes multiples of {TILE} from {MIN_WINDOW} on (default {WINDOW})"
        )


def _text_config(config: Any) -> Any:
    from vllm_kqsvd.projection_rope import text_config

    return text_config(config)


def _config(model: str) -> Any:
    from transformers import AutoConfig

    if not (Path(model) / "config.json").is_file():
        raise ConfigError(f"{model} has no config.json; give a Hugging Face model folder")
    try:
        return AutoConfig.from_pretrained(model)
    except Exception as e:  # noqa: BLE001  transformers checks some values by computing with them
        why = " ".join(str(e).split())
        raise ConfigError(f"cannot read {model}/config.json: {why[:300]}") from e


def _shape(config: Any, ranks: int) -> tuple[int, int, int]:
    """(KV heads, head_dim, layers). Raises UnsupportedError where not every layer keeps the whole context, and
    ConfigError for sizes that are none or that vLLM does not split over `ranks` GPUs."""
    from vllm_kqsvd.projection_rope import head_dim_of

    text = _text_config(config)
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedError("the model's attention keeps latents already (MLA); kqsvd does not apply to it")
    kinds = set(getattr(text, "layer_types", None) or ())
    window = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    if kinds - {"full_attention"} or (window and not kinds):
        raise UnsupportedError("`kqsvd plan` knows only models in which every layer attends to the whole context")
    queries, layers = getattr(text, "num_attention_heads", 0), getattr(text, "num_hidden_layers", 0)
    heads = getattr(text, "num_key_value_heads", None) or queries
    if not (isinstance(queries, int) and isinstance(layers, int) and queries > 0 and layers > 0 and heads > 0):
        raise ConfigError(f"the model's config has {queries} query heads, {heads} KV heads and {layers} layers")
    if queries % ranks or (heads % ranks and ranks % heads):
        raise ConfigError(
            f"--tp is {ranks}; vLLM splits {queries} query and {heads} KV heads only over numbers that divide them "
            "(or are multiples of the KV heads)"
        )
    dim = head_dim_of(text)
    if dim % TILE or not dim:
        raise UnsupportedError(f"the model's head width is {dim}; kqsvd serves multiples of {TILE}")
    return heads, dim, layers


def _weights(model: str) -> int:
    """Bytes of the weight files, 0 without any."""
    return sum(f.stat().st_size for f in Path(model).glob("*.safetensors"))


def _kv_memory(args: argparse.Namespace, config: Any, weights: int) -> int:
    if not weights:
        raise ConfigError(f"{args.model} has no safetensors files; give --weights SIZE or --kv-memory SIZE")
    more = args.overhead
    if more is None:
        more = overhead(_text_config(config), args.batched_tokens, args.max_num_seqs, args.tp)
    memory = int(usable(args.gpu) * args.utilization) - weights // args.tp - more
    if memory <= 0:
        raise ConfigError(
            f"weights of {weights / 2**30:.1f} GiB on {args.tp} GPU(s) and {more / 2**30:.1f} GiB on each for "
            f"activations and CUDA graphs leave nothing of {args.gpu / 2**30:.4g} GiB for the cache; "
            "use more GPUs (--tp) or larger ones"
        )
    return memory


def _row(f: CacheFormat, base: CacheFormat, rank: _Rank) -> dict[str, Any]:
    context, users = rank.context, rank.users
    most = f.users(rank.memory, context)
    bits = 8 * f.bytes_per_token / (rank.layers * rank.elements)
    running = int(most) if users is None else min(users, int(most))
    speed = decode_speed.tokens_per_second(f.name, bits, running, context, rank.layers, rank.elements, rank.weights)
    return {
        "name": f.name,
        "bits_per_element": round(bits, 4),
        "bytes_per_token": f.bytes_per_token,
        "bytes_per_user": f.bytes_of_request(context),
        "compression_ratio": base.bytes_of_request(context) / f.bytes_of_request(context),
        "kv_tokens": f.tokens(rank.memory, context),
        "max_users": round(most, 2),
        "fits": None if users is None else most >= users,
        "running_users": running,
        "decode_tok_s": None if speed is None else round(speed),
    }


def _text(data: dict[str, Any]) -> str:
    head = ["format", "bytes/token", "MiB/user", "ratio", "KV tokens", "users", "decode tok/s"]
    fits = data["users"] is not None
    rows: list[tuple[str, ...]] = [tuple(head + [f"{data['users']} users"] * fits)]
    for f in data["formats"]:
        cells = [f["name"], f"{f['bytes_per_token']:,}", f"{f['bytes_per_user'] / 2**20:,.1f}"]
        cells += [f"{f['compression_ratio']:.2f}", f"{f['kv_tokens']:,}", f"{f['max_users']:,.1f}"]
        cells.append("-" if f["decode_tok_s"] is None else f"{f['decode_tok_s']:,} ({f['running_users']} running)")
        rows.append(tuple(cells + ["fit" if f["fits"] else "do not fit"] * fits))
    ranks, measured = data["tensor_parallel"], data["speed_measured_on"]
    title = f"{data['kv_memory'] / 2**30:.1f} GiB of cache" + (f" on each of {ranks} GPUs" if ranks > 1 else "")
    note = f"exact window of {data['window']} tokens, scales and rounding to blocks counted"
    speed = (
        f"decode tok/s: predicted from kernel times measured on {measured['device']} ({measured['versions']}, "
        f"{measured['date']});\nsteady decoding of all running users, no prompts in between"
        + (", no exchange between GPUs" if ranks > 1 else "")
    )
    longest = data["model_context"]
    if longest and data["context"] > longest:
        speed += f"\nthe model's config names {longest:,} positions: such contexts need RoPE scaling"
    return "\n".join([f"{title}, {data['context']:,} tokens per user; {note}", "", *align(rows), "", speed])


def _plot(data: dict[str, Any], file: Path) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ConfigError("--plot needs matplotlib; pip install matplotlib") from e
    figure = Figure(figsize=(9.6, 3.2), dpi=100, layout="constrained")
    left, right = FigureCanvasAgg(figure).figure.subplots(1, 2, sharey=True)
    names = [f["name"] for f in data["formats"]][::-1]
    left.bar_label(left.barh(names, [f["max_users"] for f in data["formats"]][::-1]), fmt="%.1f", padding=3)
    left.set(xlabel=f"users of {data['context']:,} tokens in {data['kv_memory'] / 2**30:.1f} GiB")
    speeds = [f["decode_tok_s"] or 0 for f in data["formats"]][::-1]
    right.bar_label(right.barh(names, speeds, color="tab:green"), fmt="{:,.0f}", padding=3)
    who = "as many as fit" if data["users"] is None else f"up to {data['users']}"
    right.set(xlabel=f"decode tok/s, {who} users ({data['speed_measured_on']['device']})")
    for axes in (left, right):
        axes.margins(x=0.2)
    figure.suptitle("predicted", fontsize="medium")
    try:
        figure.savefig(file, metadata={"Software": None})
    except (OSError, ValueError) as e:
        raise ConfigError(f"cannot write the plot {file}: {e}") from e
