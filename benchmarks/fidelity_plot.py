# SPDX-License-Identifier: Apache-2.0
"""Plot of the fidelity table: KL against stored bits, one panel with exact sinks and window, one without.

python -m benchmarks.fidelity_plot OUT.svg [--model NAME] [--context N] [--csv FILE]
"""

from __future__ import annotations

import argparse
import csv
import re
from collections import defaultdict
from pathlib import Path

from benchmarks.fidelity import RESULTS

OURS = "vllm_kqsvd"
DEFAULT, TRIAL = f"{OURS}, default plans", f"{OURS} (compiled plans)"


def family(row: dict[str, str]) -> str:
    """Method name without its bit width: points of a family are joined by a line."""
    if row["sinks"] == "class":  # ours alone
        kind = row["method"].rsplit("-", 1)[-1]
        return {"catalogue": TRIAL, "default": DEFAULT}.get(kind, OURS)
    return re.sub(r"[-_]\d(bit)?(-g\d+)?(_nc)?(?=$|-all-layers)", "", row["method"])


def points(rows: list[dict], window: bool) -> dict[str, list[tuple[float, float]]]:
    """(bits, KL averaged over texts) of every family, by bits. The latest row of a text and method counts."""
    latest: dict[tuple[str, str, float], dict[str, float]] = defaultdict(dict)
    for row in rows:
        if (int(row["window"]) > 0) == window:
            latest[family(row), row["method"], float(row["bits"])][row["text"]] = float(row["kl"])
    out: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for (name, _, bits), texts in latest.items():
        out[name].append((bits, sum(texts.values()) / len(texts)))
    return {name: sorted(found) for name, found in sorted(out.items())}


def selected(row: dict[str, str], model: str, context: int) -> bool:
    """Harness rows of plain text for one model and context, the uncompressed cache left out."""
    plain = "(" not in row["method"] and "(" not in row["text"] and row["method"] != "bf16"
    return plain and row["model"] == model and int(row["context"]) == context


def on_common_texts(rows: list[dict]) -> list[dict]:
    """The rows of texts that every method was measured on: means over different texts do not compare."""
    texts: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for row in rows:
        texts[row["method"], row["bits"], row["window"]].add(row["text"])
    common = set.intersection(*texts.values()) if texts else set()
    return [row for row in rows if row["text"] in common]


def main() -> None:
    """Read the table, draw, save."""
    from matplotlib.figure import Figure

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    options = parser.parse_args()
    with options.csv.open(newline="") as f:
        rows = [r for r in csv.DictReader(f) if selected(r, options.model, options.context)]
    # Where the calibrator's default plans were measured, rows without a mark have any plan, and earlier trials go.
    has_default = any(family(row) == DEFAULT for row in rows)
    rows = on_common_texts([r for r in rows if not (has_default and family(r) == TRIAL)])
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    names = sorted({family(row) for row in rows})
    colors = dict(zip(names, (f"C{i}" for i in range(10)), strict=False))
    for panel, window in zip(panels, (True, False), strict=True):
        for name, found in points(rows, window).items():
            label = name
            style = {"color": colors.get(name, "olive"), "alpha": 0.7, "marker": "o"}
            if name.startswith(OURS):
                style = {"color": "black", "linewidth": 2.5, "marker": "o"}
                label = name + (" (any plan)" if has_default and name == OURS else "")
                style |= {"linestyle": "--", "linewidth": 1} if label.endswith(")") else {}
            panel.plot(*zip(*found, strict=True), label=label, **style)
        panel.set(yscale="log", xlabel="stored bits per element of K and V")
        panel.set_title("exact sinks and last 64 tokens" if window else "nothing exact")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("KL to the exact cache, nats per token")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.suptitle(f"{options.model}, {options.context} tokens")
    figure.savefig(options.out)


if __name__ == "__main__":
    main()
