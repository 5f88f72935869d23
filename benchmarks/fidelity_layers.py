# SPDX-License-Identifier: Apache-2.0
"""Layers of unequal budgets, mixed from finished projections: would bytes move between layers, what would that gain?

    python -m benchmarks.fidelity_layers measure MODEL TABLE --projection DIR... --data CALIBRATION_TEXT...
    python -m benchmarks.fidelity_layers mix TABLE OUT --projection DIR... --bits 3

`measure` codes one layer alone with each projection, on windows of calibration text (never the text that is reported),
and appends the KL of the model's output to TABLE (CSV); rows that are there are not measured again. `mix` gives every
layer the projection of least summed KL at the bytes of equal layers, and saves OUT, a projection folder that
benchmarks.fidelity scores. Projections have to be of one model; each row names its digest.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.fidelity import installed, shown
from vllm_kqsvd.calibration.allocate import plane_bytes
from vllm_kqsvd.calibration.layer_budgets import choose, without_pattern
from vllm_kqsvd.projection import Projection, load_projection, save_projection
from vllm_kqsvd.verify import load_model
from vllm_kqsvd.verify_harness import ProjectionCodec, ReadRule, Window, run_windows
from vllm_kqsvd.verify_text import read_text, text_windows

COLUMNS = "date device versions command model text context scored window layer bytes digest kl".split()
Row = tuple[str, str, str, str]  # text, window, layer, digest
EXACT = 64  # recent tokens read exactly


def measure(
    model,
    windows: list[Window],
    projections: list[Projection],
    layers: list[int],
    known: set[Row],
) -> Iterator[dict[str, object]]:
    """One row per window, layer and projection: mean KL of the model when this layer alone is coded so.

    known: rows that are there already, left out.
    """
    rule = ReadRule(EXACT, prefill=windows[0].first_scored)
    for w, window in enumerate(windows):
        todo = [
            (i, n)
            for i in layers
            for n, p in enumerate(projections)
            if (window.text, str(w), str(i), p.digest[:12]) not in known
        ]
        settings = {f"{i} {n}": (ProjectionCodec({i: projections[n].layers[i].codec}), rule) for i, n in todo}
        if not todo:
            continue
        for (i, n), (_, _, score) in zip(todo, run_windows(model, [window], settings), strict=True):
            yield {
                "text": window.text,
                "window": w,
                "layer": i,
                "bytes": projections[n].layers[i].codec.plan.bytes_per_token,
                "digest": projections[n].digest[:12],
                "kl": f"{float(score.kl.mean()):.4e}",
            }


def read_costs(table: Path, projections: list[Projection]) -> np.ndarray:
    """KL of every layer alone, up to a common factor: [layers, projections].

    A layer has one sensitivity, the geometric mean over all windows and rates measured for every layer, texts weighed
    alike, and four times less KL for every bit more: windows agree on layers far better than on the sum.
    """
    with table.open(newline="") as f:
        rows = list(csv.DictReader(f))
    layers = sorted(projections[0].layers)
    own = {p.digest[:12] for p in projections}
    columns: dict[tuple[str, ...], dict[int, float]] = defaultdict(dict)
    for r in rows:
        if r["digest"] in own:
            column = columns[r["text"], r["context"], r["scored"], r["window"], r["digest"]]
            column[int(r["layer"])] = np.log(float(r["kl"]))
    texts = defaultdict(list)
    for (text, *_), column in columns.items():
        if set(column) >= set(layers):
            one = np.array([column[i] for i in layers])
            texts[text].append(one - one.mean())
    sensitivity = np.exp(np.mean([np.mean(found, 0) for found in texts.values()], 0))
    widths = np.array([16 / p.compression_ratio() for p in projections])
    return np.asarray(sensitivity[:, None] * 4.0 ** (widths.min() - widths))


def mixed(projections: list[Projection], chosen: list[int]) -> Projection:
    """The projection whose n-th layer is that of projections[chosen[n]]."""
    base = projections[0]
    order = sorted(base.layers)
    layers = {i: projections[n].layers[i] for i, n in zip(order, chosen, strict=True)}
    bytes_ = sum(e.codec.plan.bytes_per_token for e in layers.values()) / len(layers)
    about: dict[str, object] = {
        "bits_per_element": 8 * bytes_ / (2 * base.model.head_dim),
        "mixed_from": [p.digest for p in projections],
    }
    return Projection(base.model, layers, base.calibration | about, [])


def main() -> None:
    """Measure, or mix."""
    options = parse()
    projections = [load_projection(p) for p in options.projection]
    if options.command == "mix":
        mix(options, projections)
        return
    model, tokenizer = load_model(options.model, options.device, torch.float32)
    layers = options.layers or sorted(projections[0].layers)
    rows = list(csv.DictReader(options.table.open(newline=""))) if options.table.exists() else []
    length = str(options.context), str(options.scored)
    known = {(r["text"], r["window"], r["layer"], r["digest"]) for r in rows if (r["context"], r["scored"]) == length}
    shared = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else f"cpu {platform.machine()}",
        "versions": "; ".join(f"{p} {installed(p)}" for p in ("vllm_kqsvd", "torch", "transformers")),
        "command": "python -m benchmarks.fidelity_layers " + shlex.join(shown(sys.argv[1:])),
        "model": options.model.name,
        "context": options.context,
        "scored": options.scored,
    }
    with options.table.open("a", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        if not rows:
            writer.writeheader()
        for path in options.data:
            windows = text_windows(
                read_text(path), path.stem, tokenizer, options.context, options.windows, options.scored, False
            )
            for row in measure(model, windows, projections, layers, known):
                writer.writerow(shared | row)
                f.flush()


def mix(options: argparse.Namespace, projections: list[Projection]) -> None:
    """Choose, say what was chosen, save."""
    first = projections[0]
    size = [p.layers[min(p.layers)].codec.plan.bytes_per_token for p in projections]
    equal = plane_bytes(options.bits, first.model.head_dim) + 2
    cost = read_costs(options.table, projections)
    chosen = without_pattern(cost, size, choose(cost, size, equal * len(first.layers)))
    predicted = sum(cost[n, c] for n, c in enumerate(chosen))
    if equal in size:
        predicted /= cost[:, size.index(equal)].sum()
        print(f"predicted: {predicted:.3f} of the KL of equal layers")
    print("bytes a layer:", *(size[c] for c in chosen))
    print(save_projection(mixed(projections, chosen), options.out), file=sys.stderr)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("measure")
    one.add_argument("model", type=Path)
    one.add_argument("table", type=Path)
    one.add_argument("--projection", type=Path, nargs="+", required=True)
    one.add_argument("--data", type=Path, nargs="+", required=True, help="calibration text files")
    one.add_argument("--context", type=int, default=1024)
    one.add_argument("--scored", type=int, default=256)
    one.add_argument("--windows", type=int, default=2, help="windows per text")
    one.add_argument("--layers", type=int, nargs="*")
    one.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    two = commands.add_parser("mix")
    two.add_argument("table", type=Path)
    two.add_argument("out", type=Path)
    two.add_argument("--projection", type=Path, nargs="+", required=True)
    two.add_argument("--bits", type=float, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
