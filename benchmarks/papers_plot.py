# SPDX-License-Identifier: Apache-2.0
"""Plot of benchmarks/papers.py: errors per layer at equal rank, the unbalance experiment, keys at few bits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

NAMES = {
    "kqsvd": "KQ-SVD",
    "ksvd": "K-SVD",
    "eigen": "Eigen",
    "svdq": "SVDq",
    "per channel": "per channel",
    "ours": "ours",
}


def plot(rows: Sequence[tuple[str, int, str, str, str, float]], path: Path) -> None:
    """Four panels; rows as papers.py makes them (experiment, layer, method, setting, metric, value)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    logits, output, unbalance, bits = figure.subplots(2, 2).flat
    for axis, metric in ((logits, "QK^T held out"), (output, "attention output held out")):
        lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for experiment, layer, method, _, name, value in rows:
            if (experiment, name) == ("equal rank", metric):
                lines[method].append((layer, value))
        for method, points in lines.items():
            axis.plot(*zip(*sorted(points), strict=True), "o-", markersize=3, label=NAMES.get(method, method))
        axis.set(xlabel="layer", ylabel="relative error", ylim=(0, None), title=f"{metric}, equal rank")
    means: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for experiment, _, method, setting, name, value in rows:
        means[experiment, method, f"{setting}|{name}"].append(value)
    curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
    bars: dict[str, float] = {}
    for (experiment, method, key), values in means.items():
        setting, name = key.split("|")
        mean = sum(values) / len(values)
        if experiment == "unbalance":
            curves[method].append((float(setting.split()[1]), mean))
        elif experiment == "keys" and name == "squared error of QK^T":
            bars[f"{NAMES.get(method, method)}\n{setting}"] = mean
    for method, points in curves.items():
        unbalance.plot(*zip(*sorted(points), strict=True), "o-", label=NAMES.get(method, method))
    unbalance.set(
        xlabel="alpha (keys times alpha, queries over alpha)", ylabel="relative error of QK^T", ylim=(0, None)
    )
    order = sorted(bars, key=lambda x: -bars[x])
    bits.bar(order, [bars[x] for x in order])
    bits.set(yscale="log", ylabel="squared error of QK^T over its energy", title="keys alone, few bits, mean of layers")
    bits.tick_params(axis="x", labelsize=7)
    for axis in (logits, output, unbalance):
        axis.legend()
    figure.savefig(path, dpi=130)
