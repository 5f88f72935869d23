# SPDX-License-Identifier: Apache-2.0
"""Every basis of the calibrator, with and without the mean, in the same format at the same bytes: KL on held-out text.

    python -m benchmarks.bases MODEL --statistics FILE --data FILE... [--bits 3] [--bases NAME...]

`--nested` solves in nested order, `--cut-from 4` measures what `kqsvd cut` makes of a file of 4 bits; the basis column
says both.

The statistics are those a calibration leaves behind (`collect_statistics`); one row per basis and text is appended to
benchmarks/results/bases.csv as soon as it is measured.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.fidelity import installed, shown
from vllm_kqsvd.calibration.basis import BASES
from vllm_kqsvd.calibration.calibrate import CalibrateOptions, project
from vllm_kqsvd.calibration.capture import load_model as load_for_probe
from vllm_kqsvd.calibration.collect import CollectOptions
from vllm_kqsvd.calibration.cut import cut
from vllm_kqsvd.calibration.model_probe import LayerInfo, probe
from vllm_kqsvd.calibration.statistics import Statistics
from vllm_kqsvd.projection import Projection
from vllm_kqsvd.verify import load_model, projection_codec
from vllm_kqsvd.verify_harness import ReadRule, Reference, Score, score
from vllm_kqsvd.verify_result import Fidelity
from vllm_kqsvd.verify_text import read_text, text_windows

RESULTS = Path(__file__).parent / "results" / "bases.csv"
CENTER = {"both": (True, False), "yes": (True,), "no": (False,)}
COLUMNS = (
    "date device versions command model statistics text context basis center bits plans kl top1 perplexity"
    " perplexity_exact logit_error predicted_logit_error positions"
).split()


class NoText:
    """Stands for the text in a projection that is measured and not saved."""

    def describe(self) -> list[dict[str, object]]:
        """No files."""
        return []


def solved(
    options: argparse.Namespace, layers: list[LayerInfo], statistics: Statistics, name: str, center: bool
) -> Iterator[Projection]:
    """The projections of one basis, one per number of bits."""

    def at(bits: float) -> Projection:
        settings = CalibrateOptions(
            bits=bits, basis=name, center=center, nested=options.nested, plans=options.plans, collect=collect
        )
        return project(options.model, layers, statistics, NoText(), settings)

    collect = CollectOptions(**statistics.options["collect"])
    whole = at(options.cut_from) if options.cut_from else None
    for bits in options.bits:
        yield cut(whole, bits) if whole else at(bits)


def label(options: argparse.Namespace, name: str) -> str:
    """What stands in the basis column."""
    nested = ", nested" if options.nested else ""
    return name + nested + (f", cut from {options.cut_from:g} bits" if options.cut_from else "")


def rms(values) -> float:
    """Root mean square."""
    values = list(values)
    return (sum(x * x for x in values) / len(values)) ** 0.5


def row(options: argparse.Namespace, name: str, center: bool, found: Projection, text: str, one: Score) -> list[object]:
    """One line of the CSV."""
    fidelity = Fidelity.of(text, [one])
    about = found.calibration
    return [
        datetime.datetime.now(datetime.UTC).date().isoformat(),
        f"cpu {platform.machine()}",
        "; ".join(f"{p} {installed(p)}" for p in ("vllm_kqsvd", "torch", "transformers")),
        "python -m benchmarks.bases " + shlex.join(shown(sys.argv[1:])),
        options.model.name,
        f"{about['num_windows']} x {about['window_length']}",
        text,
        options.context,
        name,
        center,
        f"{16 / found.compression_ratio():.3f}",
        options.plans,
        f"{fidelity.kl:.6f}",
        f"{fidelity.top1:.4f}",
        f"{fidelity.perplexity:.4f}",
        f"{fidelity.perplexity_exact:.4f}",
        f"{rms(one.logit_error.values()):.4f}",
        f"{rms(found.predicted):.4f}",
        fidelity.positions,
    ]


def main() -> None:
    """Measure and append."""
    options = parse()
    statistics = Statistics.load(options.statistics, None, "cpu")
    layers = probe(load_for_probe(str(options.model), "cpu", torch.float32))
    model, tokenizer = load_model(options.model, "cpu", torch.float32)
    exact = [
        Reference(model, window)
        for path in options.data
        for window in text_windows(read_text(path), path.stem, tokenizer, options.context, 1, options.scored)
    ]
    new = not options.output.exists()
    with options.output.open("a", newline="") as f:
        writer = csv.writer(f, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        tasks = [(name, center) for name in options.bases for center in CENTER[options.center]]
        for name, center in tasks:
            for found in solved(options, layers, statistics, name, center):
                codec, rule = projection_codec(found), ReadRule(64, prefill=options.context - options.scored)
                for reference in exact:
                    one = score(model, reference.window, reference, codec, rule)
                    writer.writerow(row(options, label(options, name), center, found, reference.window.text, one))
                    f.flush()
                    print(
                        label(options, name), center, reference.window.text, f"{float(one.kl.mean()):.5f}", flush=True
                    )


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--statistics", type=Path, required=True)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="held-out text")
    parser.add_argument("--bits", type=float, nargs="+", default=[3.0])
    parser.add_argument("--cut-from", type=float, default=0, metavar="BITS", help="cut a projection of so many bits")
    parser.add_argument("--nested", action="store_true", help="as in kqsvd calibrate")
    parser.add_argument("--center", choices=tuple(CENTER), default="both", help="with the mean removed or not")
    parser.add_argument("--plans", default="free", help="bit plans as in kqsvd calibrate (default %(default)s)")
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=BASES)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--scored", type=int, default=512)
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
