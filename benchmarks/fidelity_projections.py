# SPDX-License-Identifier: Apache-2.0
"""Projections of many budgets from one reading of the calibration text, with the time every part takes.

    python -m benchmarks.fidelity_projections MODEL OUT --data FILE... [--bits 4 3 2.5 2] [--plans free auto]

Writes OUT/{model}-{bits}bit with any plan (free), -catalogue with compiled plans, -default with what `kqsvd calibrate`
chooses unasked (auto), and OUT/statistics.safetensors. Every layer has the same bytes unless `--layer-budgets` says
otherwise. `--statistics FILE` solves from what an earlier run collected, so that several processes can share the
budgets; they need the same options and data.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import torch

from vllm_kqsvd.calibration.calibrate import CalibrateOptions, project
from vllm_kqsvd.calibration.capture import load_model
from vllm_kqsvd.calibration.collect import CollectOptions, Collector
from vllm_kqsvd.calibration.corpus import Corpus
from vllm_kqsvd.calibration.layer_budgets import LAYER_BUDGETS
from vllm_kqsvd.calibration.layer_costs import budget_texts
from vllm_kqsvd.calibration.model_probe import probe
from vllm_kqsvd.calibration.statistics import Statistics
from vllm_kqsvd.projection import save_projection

SUFFIX = {"free": "", "catalogue": "-catalogue", "auto": "-default"}


def main() -> None:
    """Collect (or load), then solve and save every budget."""
    from transformers import AutoTokenizer

    options = parse()
    collect = CollectOptions(num_windows=options.num_windows, gradient_windows=options.gradient_windows)
    began = time.monotonic()

    def done(what: str) -> None:
        print(json.dumps({"what": what, "seconds": round(time.monotonic() - began, 2)}), flush=True)

    tokenizer = AutoTokenizer.from_pretrained(str(options.model))
    corpus = Corpus(options.data, tokenizer, collect.window_length, collect.seed, collect.chat)
    model = load_model(str(options.model), options.device, getattr(torch, options.dtype))
    layers = probe(model)
    done("model loaded and probed")
    if options.statistics:
        statistics = Statistics.load(options.statistics, None, options.device)
    else:
        collector = Collector(model, layers, corpus, collect)
        statistics = collector.start({"collect": dataclasses.asdict(collect)})
        collector.run(statistics, range(collect.num_windows))
        done(f"moments of {collect.num_windows} x {collect.window_length} tokens")
        collector.run(statistics, range(collect.num_windows, collector.num_steps))
        done(f"gradients of {collect.gradient_windows} x {collect.gradient_length} tokens")
        options.out.mkdir(parents=True, exist_ok=True)
        partial = options.out / "statistics.partial"  # readers wait for the final name
        statistics.save(partial)
        partial.rename(options.out / "statistics.safetensors")
    statistics.texts = statistics.texts or budget_texts(corpus, collect.num_steps)
    for plans in options.plans:
        for bits in options.bits:
            settings = CalibrateOptions(bits=bits, plans=plans, layer_budgets=options.layer_budgets, collect=collect)
            projection = project(options.model, layers, statistics, corpus, settings, options.device, model)
            name = f"{options.model.name}-{bits:g}bit" + SUFFIX[plans]
            save_projection(projection, options.out / name)
            done(f"solved {name}")


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="calibration text files")
    parser.add_argument("--bits", type=float, nargs="*", default=[4.0, 3.0, 2.5, 2.0])
    parser.add_argument("--plans", nargs="+", default=["free", "catalogue"], choices=tuple(SUFFIX))
    parser.add_argument("--layer-budgets", choices=LAYER_BUDGETS, default="equal", help="as in kqsvd calibrate")
    parser.add_argument("--statistics", type=Path, help="solve from this file instead of collecting")
    parser.add_argument("--num-windows", type=int, default=CollectOptions.num_windows)
    parser.add_argument("--gradient-windows", type=int, default=CollectOptions.gradient_windows)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    return parser.parse_args()


if __name__ == "__main__":
    main()
