# SPDX-License-Identifier: Apache-2.0
"""The fidelity table: KL, top-1 agreement and perplexity of KV-cache formats on held-out text.

    python -m benchmarks.fidelity MODEL --data FILE... [--projection DIR...] [--methods NAME...] [--context 2048]

Every method is measured twice: with the same exact first 4 tokens and last 64 (ours: class-bit sinks and the
window), and with nothing exact. The prompt is prefilled exactly and stored; the last tokens of each window (a quarter,
or --scored) are decoded from the cache. One row per text and method is appended to benchmarks/results/fidelity.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import platform
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks import peers
from vllm_kqsvd.projection import Projection, load_projection
from vllm_kqsvd.verify import load_model, projection_codec
from vllm_kqsvd.verify_harness import ReadRule, Score, run_windows
from vllm_kqsvd.verify_result import Fidelity
from vllm_kqsvd.verify_text import read_text, text_windows

COLUMNS = (
    "date device versions command model text context method bits sinks window kl top1 perplexity perplexity_bf16"
    " kl_se kl_p99 positions chunk"
).split()
RESULTS = Path(__file__).parent / "results" / "fidelity.csv"
SINKS, WINDOW = 4, 64


def peer_codecs(num_layers: int, ours: Projection | None, device: str = "cpu") -> dict[str, object]:
    """Every other format by name. The centred ones take their means from `ours`."""
    turbo = [peers.TurboQuantCodec(b) for b in (4, 3)]
    boundary = peers.boundary_layers(num_layers)
    codecs = [
        peers.Bf16Codec(),
        peers.Fp8Codec(),
        peers.SkipLayers(peers.Fp8Codec(), boundary, num_layers, "fp8-boundary16"),
        peers.Int4PerTokenHeadCodec(),
        peers.KiviCodec(4),
        peers.Nvfp4Codec(),
        *(peers.SkipLayers(codec, boundary, num_layers) for codec in turbo),
        *(peers.SkipLayers(codec, (), num_layers, f"{codec.name}-all-layers") for codec in turbo),
        *(peers.RotatedLloydMaxCodec(b) for b in (4, 3)),
    ]
    if ours:
        layers = {i: entry.codec.to(device) for i, entry in ours.layers.items()}
        rivals = [
            peers.Fp8Codec(),
            peers.Int4PerTokenHeadCodec(),
            *(peers.RotatedLloydMaxCodec(b) for b in (4, 3, 2)),
        ]
        codecs += [peers.CentredCodec(codec, layers) for codec in rivals]
    return {codec.name: codec for codec in codecs}


def settings(
    codecs: Mapping[str, object],
    folders: Mapping[str, Projection],
    prefill: int,
    chunk: int,
    device: str,
    windows: Iterable[int] = (WINDOW, 0),
) -> dict[str, tuple[object, ReadRule]]:
    """Method and reading rule by "name|window"."""
    out = {}
    for window in windows:
        for name, codec in codecs.items():
            out[f"{name}|{window}"] = (codec, ReadRule(window, SINKS if window else 0, chunk or 1, prefill))
        for name, folder in folders.items():
            out[f"{name}|{window}"] = (projection_codec(folder, device, name), ReadRule(window, 0, chunk or 1, prefill))
    return out


def bits_of(codec: object, folders: Mapping[str, Projection], head_dim: int) -> float:
    """Stored bits per element of K and V, exact tokens not counted."""
    if codec.name in folders:
        return 16 / folders[codec.name].compression_ratio()
    return codec.bits(head_dim)


def main() -> None:
    """Measure and append."""
    options = parse()
    device = options.device
    folders = {p.name: load_projection(p) for p in options.projection}
    model, tokenizer = load_model(options.model, device, getattr(torch, options.dtype))
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    codecs = peer_codecs(config.num_hidden_layers, next(iter(folders.values()), None), device)
    if options.methods is not None:
        codecs = {name: codec for name, codec in codecs.items() if name in options.methods}
    scored = options.scored or options.context // 4
    prefill = 0 if options.chunk else options.context - scored
    todo = settings(codecs, folders, prefill, options.chunk, device, options.exact)
    for path in options.data:
        name = f"{path.stem} (chat)" if options.chat else path.stem
        windows = text_windows(read_text(path), name, tokenizer, options.context, options.windows, scored, options.chat)
        scores: dict[str, list[Score]] = defaultdict(list)
        for _, method, score in run_windows(model, windows, todo):
            scores[method].append(score)
            print(f"{name} {method}: {float(score.kl.mean()):.5f}", file=sys.stderr, flush=True)
        rows = []
        for method, found in scores.items():
            codec, rule = todo[method]
            sinks = rule.sinks if codec.name not in folders else "class"
            fidelity = Fidelity.of(name, found)
            print(fidelity.row(), method)
            bits = bits_of(codec, folders, head_dim)
            name_shown = f"{codec.name} ({options.note})" if options.note else codec.name
            rows.append(table_row(fidelity, options, name_shown, bits, sinks, rule, folders.get(codec.name)))
        append(rows, options.output)  # a text at a time: what is measured is kept


def table_row(
    fidelity: Fidelity,
    options,
    method: str,
    bits: float,
    sinks: object,
    rule: ReadRule,
    ours: Projection | None = None,
    program: str = "fidelity",
) -> dict:
    """One CSV row."""
    packages = ("vllm_kqsvd", "torch", "transformers", *(("vllm",) if program != "fidelity" else ()))

    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else f"cpu {platform.machine()}",
        "versions": "; ".join(f"{p} {installed(p)}" for p in packages)
        + (f"; projection {ours.digest[:12]}" if ours else ""),
        "command": f"python -m benchmarks.{program} " + shlex.join(shown(sys.argv[1:])),
        "model": options.model.name,
        "text": fidelity.text,
        "context": options.context,
        "method": method,
        "bits": f"{bits:.3f}",
        "sinks": sinks,
        "window": rule.window,
        "kl": f"{fidelity.kl:.6f}",
        "top1": f"{fidelity.top1:.4f}",
        "perplexity": f"{fidelity.perplexity:.4f}",
        "perplexity_bf16": f"{fidelity.perplexity_exact:.4f}",
        "kl_se": "" if fidelity.kl_se is None else f"{fidelity.kl_se:.6f}",
        "kl_p99": f"{fidelity.kl_p99:.5f}",
        "positions": fidelity.positions,
        "chunk": rule.chunk,
    }


def installed(package: str) -> str:
    """Version of an installed distribution; vLLM's CPU build has a name of its own."""
    for name in (package, f"{package}-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            return version(name)
    return "not installed"


def shown(arguments: Iterable[str]) -> list[str]:
    """Command-line arguments with folders cut to their names: rows say what ran, not where."""
    return [Path(a).name if "/" in a else a for a in arguments]


def append(rows: list[dict], path: Path) -> None:
    """Append rows to the CSV, writing its header first if it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="held-out text files")
    parser.add_argument("--projection", type=Path, nargs="*", default=[], help="projection folders (ours)")
    parser.add_argument("--methods", nargs="*", help="peers to run (default: all; none: only ours)")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=2, help="windows per text")
    parser.add_argument("--scored", type=int, help="last tokens of a window that are scored (default: a quarter)")
    parser.add_argument("--chat", action="store_true", help="put the texts into the model's chat template")
    parser.add_argument("--chunk", type=int, default=0, help="prefill in steps of so many tokens; 0: exact prompt")
    parser.add_argument(
        "--exact", type=int, nargs="+", default=[WINDOW, 0], help="exact last tokens; 0: nothing exact (default: both)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--note", help="added to the methods' names: keeps these rows out of the main tables")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
