# SPDX-License-Identifier: Apache-2.0
"""Plot of serving under load: output tokens per second against time per output token, one panel per load.

python -m benchmarks.serving_plot OUT.png [--model NAME]
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

from benchmarks.report_tables import Row, newest, read

ARMS = {  # format -> (label, colour)
    "auto": ("bf16", "0.2"),
    "fp8": ("fp8", "0.5"),
    "int4_per_token_head": ("int4_per_token_head", "tab:purple"),
    "turboquant_4bit_nc": ("TurboQuant 4-bit", "tab:brown"),
    "turboquant_3bit_nc": ("TurboQuant 3-bit", "tab:pink"),
    "kqsvd-4": ("ours, 4.1 bits", "tab:blue"),
    "kqsvd-3": ("ours, 3.1 bits", "tab:green"),
    "kqsvd-2.5": ("ours, 2.6 bits", "tab:red"),
    "kqsvd-2": ("ours, 2.1 bits", "tab:orange"),
}


def load_name(row: Row) -> str:
    """What was asked for, from the lengths."""
    ask = f"{row['input_len']} in, {row['output_len']} out" if row["input_len"].isdigit() else row["input_len"]
    return f"{ask}, {row['requests']} requests" + (f", TP {row['tensor_parallel']}" if _ranks(row) > 1 else "")


def _ranks(row: Row) -> int:
    return int(row.get("tensor_parallel") or 1)


def load_rows() -> list[Row]:
    """The newest rows measured with real prefill (`vllm bench serve`), those with latencies."""
    rows = [r for r in read("serving") if r.get("tpot_p50") and r.get("tok_s")]
    return newest(rows, ("device", "model", "format", "tensor_parallel", "input_len", "output_len", "requests"))


def draw(rows: list[Row], out: Path) -> None:
    """One panel per model and load; up and to the left is better."""
    from matplotlib.figure import Figure

    panels: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        panels[row["model"], load_name(row)].append(row)
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * lines + 0.6), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel, ((model, load), found) in zip(axes, panels.items(), strict=False):
        for row in found:
            label, colour = ARMS.get(row["format"], (row["format"], "tab:cyan"))
            x, tail, y = float(row["tpot_p50"]), float(row["tpot_p99"] or row["tpot_p50"]), float(row["tok_s"])
            panel.plot([x, tail], [y, y], "-", color=colour, alpha=0.5)
            panel.plot(x, y, "o", color=colour, label=label, markersize=8)
        panel.set(xlabel="ms per output token, median to p99", title=f"{model}: {load}", xlim=(0, None), ylim=(0, None))
        panel.title.set_fontsize(9)
        panel.grid(alpha=0.3)
    for panel in axes[len(panels) :]:
        panel.set_visible(False)
    for first in axes[::columns]:
        first.set_ylabel("output tokens per second")
    handles = {h.get_label(): h for a in axes for h in a.get_lines() if not h.get_label().startswith("_")}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, fontsize=8)
    figure.suptitle(f"Serving under load, {', '.join(sorted({r['device'] for r in rows}))}")
    figure.savefig(out, dpi=110)


def main(argv: list[str] | None = None) -> None:
    """Read, draw, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", help="only this model")
    options = parser.parse_args(argv)
    draw([r for r in load_rows() if options.model in (None, r["model"])], options.out)


if __name__ == "__main__":
    main()
