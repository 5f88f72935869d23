# SPDX-License-Identifier: Apache-2.0
"""Curves of serving under load: output tokens per second against latency, one row of panels per model and load.

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
AXES = {  # latency -> label
    "tpot": "ms per output token, median to p99",
    "ttft": "ms to the first token, median to p99",
}
KEYS = ("device", "model", "format", "tensor_parallel", "input_len", "output_len", "requests", "concurrency")


def load_name(row: Row) -> str:
    """What was asked for: lengths, and GPUs if several."""
    ask = f"{row['input_len']} in, {row['output_len']} out" if row["input_len"].isdigit() else row["input_len"]
    return ask + (f", TP {row['tensor_parallel']}" if int(row.get("tensor_parallel") or 1) > 1 else "")


def length(row: Row) -> int:
    """Tokens of a prompt; 0 where a trace says it."""
    return int(row["input_len"]) if row["input_len"].isdigit() else 0


def at_a_time(row: Row) -> int:
    """How many requests the client kept open."""
    return int(row.get("concurrency") or row["requests"])


def load_rows() -> list[Row]:
    """The newest row of every format, load and concurrency, by load."""
    rows = newest([r for r in read("serving_load") if r.get("tok_s")], KEYS)
    return sorted(rows, key=lambda r: (r["device"], r["model"], length(r), load_name(r), at_a_time(r)))


def draw(rows: list[Row], out: Path) -> None:
    """Per model, load and device a panel for each latency; up and to the left is better."""
    from matplotlib.figure import Figure

    panels: dict[tuple[str, str, str], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        panels[row["device"], row["model"], load_name(row)][row["format"]].append(row)
    panels = {k: v for k, v in panels.items() if sum(map(len, v.values())) > 1} or panels  # one point compares nothing
    figure = Figure(figsize=(9.6, 2.7 * len(panels) + 0.5), layout="constrained")
    axes = figure.subplots(len(panels), len(AXES), squeeze=False)
    for line, ((device, model, load), found) in zip(axes, panels.items(), strict=True):
        for panel, (latency, label) in zip(line, AXES.items(), strict=True):
            for name, curve in found.items():
                title, colour = ARMS.get(name, (name, "tab:cyan"))
                y = [float(r["tok_s"]) for r in curve]
                x = [float(r[f"{latency}_p50"]) for r in curve]
                panel.plot(x, y, "o-", color=colour, label=title)
                tails = [float(r[f"{latency}_p99"] or m) for r, m in zip(curve, x, strict=True)]
                panel.hlines(y, x, tails, color=colour, alpha=0.35)
                for row, at in zip(curve, zip(x, y, strict=True), strict=True):
                    panel.annotate(
                        str(at_a_time(row)), at, (3, 4), textcoords="offset points", fontsize=7, color=colour
                    )
            highest = max(float(r["tok_s"]) for curve in found.values() for r in curve)
            panel.set(xlabel=label, xlim=(0, None), ylim=(0, 1.15 * highest))
            panel.grid(alpha=0.3)
        line[0].set_ylabel("output tokens per second")
        line[0].set_title(f"{model}: {load}", fontsize=9)
        line[-1].set_title(device, fontsize=9)
    handles = {h.get_label(): h for a in axes.flat for h in a.get_lines() if not h.get_label().startswith("_")}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, fontsize=8)
    figure.suptitle("Serving under load; numbers at the points: requests at a time", fontsize=10)
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
