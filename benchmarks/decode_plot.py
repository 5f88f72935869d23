# SPDX-License-Identifier: Apache-2.0
"""Plot of decode attention time against context, one panel per batch, one line per format.

python -m benchmarks.decode_plot [OUT.png] [--csv FILE] [--relative]
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "decode_attention.csv"
FORMATS = {  # format -> (label, matplotlib style)
    "fa3_bf16": ("FlashAttention 3, bf16", {"color": "0.2", "linestyle": "--", "linewidth": 2}),
    "fa3_fp8": ("FlashAttention 3, fp8", {"color": "0.5", "linestyle": "--", "linewidth": 2}),
    "triton_attn": ("vLLM triton_attn, bf16", {"color": "tab:olive"}),
    "vllm_int4": ("vLLM int4_per_token_head", {"color": "tab:purple"}),
    "turboquant_4bit_nc": ("TurboQuant 4-bit", {"color": "tab:brown"}),
    "turboquant_3bit_nc": ("TurboQuant 3-bit", {"color": "tab:pink"}),
    "xformers_int4": ("xformers split-K int4", {"color": "tab:cyan"}),
    "copy": ("copy of the 2.6-bit pages", {"color": "0.7", "linestyle": ":"}),
    "d128_b130": ("ours, 4.1 bits", {"color": "tab:blue", "linewidth": 2.5}),
    "d128_b82": ("ours, 2.6 bits", {"color": "tab:red", "linewidth": 2.5}),
    "d128_b66": ("ours, 2.1 bits", {"color": "tab:orange", "linewidth": 2.5}),
    "triton_d128_b82": ("ours, 2.6 bits, Triton", {"color": "tab:red", "linestyle": ":"}),
}


def times(path: Path) -> dict[int, dict[str, dict[int, float]]]:
    """batch -> format -> context -> microseconds, of equal lengths and one query token; the latest row counts."""
    out: dict[int, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    with path.open(newline="") as f:
        for row in csv.DictReader(f):
            if row["lengths"] == "equal" and row["query_len"] == "1" and row["format"] in FORMATS:
                out[int(row["batch"])][row["format"]][int(row["context"])] = float(row["us"])
    return out


def main(argv: list[str] | None = None) -> None:
    """Read the table, draw, save."""
    from matplotlib.figure import Figure

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=RESULTS.with_suffix(".png"))
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--relative", action="store_true", help="speed over FlashAttention 3 in bf16 instead of time")
    options = parser.parse_args(argv)
    table = {batch: found for batch, found in sorted(times(options.csv).items()) if "fa3_bf16" in found}
    figure = Figure(figsize=(4 * len(table), 4.6), layout="constrained")
    panels = figure.subplots(1, len(table), sharey=True, squeeze=False)[0]
    for panel, (batch, found) in zip(panels, table.items(), strict=True):
        for name, (label, style) in FORMATS.items():
            base = found["fa3_bf16"]
            at = sorted(c for c in found.get(name, {}) if not options.relative or c in base)
            if at:
                values = [base[c] / found[name][c] if options.relative else found[name][c] for c in at]
                panel.plot(at, values, "o", markersize=3, label=label, **({"linestyle": "-"} | style))
        panel.set(xscale="log", xlabel="context, tokens", title=f"batch {batch}")
        panel.set_yscale("linear" if options.relative else "log")
        ticks = sorted({c for line in found.values() for c in line})
        panel.set_xticks(ticks, [f"{c // 1024}k" for c in ticks], minor=False)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("speed over FA3 bf16" if options.relative else "microseconds per layer")
    handles = {h.get_label(): h for p in panels for h in p.get_lines()}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, fontsize=8)
    figure.suptitle("Decode attention of one layer, 32 query heads, 8 KV heads, head_dim 128, H100")
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
