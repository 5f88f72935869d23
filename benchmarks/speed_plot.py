# SPDX-License-Identifier: Apache-2.0
"""Bars of decode attention's speed over FlashAttention 3 in bf16, by batch and context, with where they come from.

python -m benchmarks.speed_plot OUT.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.report_tables import newest, read, versions

SIZES = ((1, 1024), (1, 8192), (1, 32768), (4, 8192), (16, 8192), (64, 8192), (256, 1024))
BARS = {  # format -> (label, colour)
    "fa3_fp8": ("FlashAttention 3, fp8", "0.6"),
    "vllm_int4": ("int4_per_token_head", "tab:purple"),
    "turboquant_4bit_nc": ("TurboQuant 4-bit", "tab:brown"),
    "d128_b130": ("ours, 4.1 bits", "tab:blue"),
    "d128_b82": ("ours, 2.6 bits", "tab:red"),
}


def main(argv: list[str] | None = None) -> None:
    """Read the table, draw, save."""
    from matplotlib.figure import Figure

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    options = parser.parse_args(argv)
    rows = [r for r in read("decode_attention") if r["lengths"] == "equal" and r["query_len"] == "1"]
    rows = [r for r in newest(rows, ("batch", "context", "format")) if r["format"] in {*BARS, "fa3_bf16"}]
    us = {(int(r["batch"]), int(r["context"]), r["format"]): float(r["us"]) for r in rows}
    sizes = [s for s in SIZES if (*s, "fa3_bf16") in us]
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(BARS)
    for i, (name, (label, colour)) in enumerate(BARS.items()):
        at = [(n, us[(*s, "fa3_bf16")] / us[(*s, name)]) for n, s in enumerate(sizes) if (*s, name) in us]
        bars = axes.bar([n + (i - 2) * width for n, _ in at], [v for _, v in at], width, color=colour, label=label)
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xticks(range(len(sizes)), [f"{b} x {c // 1024}k" for b, c in sizes])
    axes.set(xlabel="batch x context", ylabel="speed over FlashAttention 3, bf16")
    axes.legend(fontsize=8, loc="upper left")
    last = max(rows, key=lambda r: r["date"])
    title = f"Decode attention, 32 / 8 heads, head_dim 128; {last['device']}, {versions(last)}, {last['date']}"
    axes.set_title(f"{title}; python -m benchmarks.decode_attention", fontsize=8)
    figure.savefig(options.out, dpi=120)


if __name__ == "__main__":
    main()
