# SPDX-License-Identifier: Apache-2.0
"""Table rows from lm-eval's results on the tasks of benchmarks/lm_eval, one folder of results and samples a cache.

    python -m benchmarks.lm_eval_results FOLDER --exact CACHE --model NAME --device TEXT --versions TEXT [--dry]

FOLDER/CACHE is the `--output_path` of one `lm_eval --log_samples`. Standard errors are over documents or passages. Word
perplexities differ far more between documents than between caches, so every cache also gets its ratio to `--exact`'s
perplexity, whose error comes from the same documents' differences. Rows are appended to
benchmarks/results/fidelity_tasks.csv.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.fidelity_tasks import COLUMNS, RESULTS

WORD, DOCUMENT = "lm-eval last word", "lm-eval long document"
RATIO = ", perplexity / uncompressed"


class Sample(NamedTuple):
    """One document or passage: its log-likelihood (nats) over `words` words, and whether the word was right."""

    loglikelihood: float
    words: float
    right: float | None = None


def perplexity(samples: Sequence[Sample], exact: Sequence[Sample] | None = None) -> tuple[float, float]:
    """Perplexity per word and its standard error; with `exact`, the ratio of both perplexities and the ratio's.

    exp of a ratio estimator, sum of losses over sum of words, with its linearized variance over samples (Cochran,
    Sampling Techniques, 6.4).
    """
    base = [e.loglikelihood for e in exact] if exact else [0.0] * len(samples)
    losses = [b - s.loglikelihood for s, b in zip(samples, base, strict=True)]
    words = sum(s.words for s in samples)
    mean, n = sum(losses) / words, len(samples)
    rest = sum((x - mean * s.words) ** 2 for x, s in zip(losses, samples, strict=True))
    return math.exp(mean), math.exp(mean) * math.sqrt(rest * n / max(1, n - 1)) / words


def accuracy(samples: Sequence[Sample]) -> tuple[float, float]:
    """Share of right words and its standard error, as lm-eval reports them."""
    mean = sum(s.right or 0.0 for s in samples) / len(samples)
    return mean, math.sqrt(mean * (1 - mean) / max(1, len(samples) - 1))


def read(folder: Path) -> tuple[dict[str, dict[int, Sample]], dict]:
    """Samples by task (documents by length) and number, in the order of the data; and the run's settings.

    A run may be in pieces (`lm_eval --samples`); the same document twice ends with a sentence.
    """
    found: dict[str, dict[int, Sample]] = {}
    for path in sorted(folder.rglob("samples_kqsvd_*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            if "word_perplexity" in line:
                length = line["doc"].get("tokens")
                task, one = DOCUMENT, Sample(*map(float, line["word_perplexity"]))
                task += f", {length} tokens" if length else ""
            else:
                task, one = WORD, Sample(float(line["perplexity"]), 1.0, float(line["acc"]))
            if found.setdefault(task, {}).setdefault(int(line["doc_id"]), one) is not one:
                raise SystemExit(f"{folder} holds sample {line['doc_id']} of {task} twice; move the other run away")
    runs = sorted(folder.rglob("results_*.json"))
    if not runs:
        raise SystemExit(f"{folder} holds no results of lm-eval; give its --output_path")
    return {t: dict(sorted(each.items())) for t, each in found.items()}, json.loads(runs[0].read_text())


def command(run: dict) -> str:
    """What ran, without folders: rows say what, not where."""

    def bare(x):
        if isinstance(x, dict):
            return {k: bare(v) for k, v in x.items()}
        return Path(x).name if isinstance(x, str) and "/" in x else x

    arguments = json.dumps(bare(run["config"]["model_args"]))
    tasks = ",".join(sorted(run["configs"]))
    return f"lm_eval --model vllm --tasks {tasks} --include_path benchmarks/lm_eval --model_args '{arguments}'"


def recorded_versions(run: dict) -> list[str]:
    """What lm-eval itself recorded: its version, PyTorch's and transformers', the dtype served in."""
    torch = re.search(r"PyTorch version: (\S+)", run.get("pretty_env_info", ""))
    known = [f"lm-eval {run['lm_eval_version']}", f"torch {torch[1]}" if torch else ""]
    known += [f"transformers {run['transformers_version']}" if run.get("transformers_version") else ""]
    return [*filter(None, known), f"served in {run['config']['model_args'].get('dtype', 'auto')}"]


def table(folder: Path, exact: str, origin: dict[str, str]) -> list[dict]:
    """Rows of every cache in `folder`, the exact one first."""
    reference, _ = read(folder / exact)
    caches = sorted(p.name for p in folder.iterdir() if next(p.rglob("results_*.json"), None))
    caches.sort(key=lambda c: c != exact)
    rows = []
    for cache in caches:
        samples, run = read(folder / cache)
        versions = "; ".join([origin["versions"], *recorded_versions(run)])
        marks = []
        for task, numbered in sorted(samples.items()):
            each = list(numbered.values())
            if task == WORD:
                marks.append((task, each, accuracy(each)))
            marks.append((f"{task}, perplexity", each, perplexity(each)))
            if cache != exact:
                if list(numbered) != list(reference.get(task, {})):
                    raise SystemExit(f"{task}: {cache} and {exact} read different samples; run both on the same ones")
                ratio = perplexity(each, list(reference[task].values()))
                marks.append((task + RATIO, each, ratio))
        for task, each, (score, error) in marks:
            found = {"task": task, "samples": len(each), "score": f"{score:.5f}", "standard_error": f"{error:.5f}"}
            rows.append({**origin, "versions": versions, "command": command(run), "cache": cache, **found})
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--exact", required=True, help="folder name of the uncompressed cache")
    parser.add_argument("--model", required=True, help="name of the served model")
    parser.add_argument("--device", required=True, help="what it was served on")
    parser.add_argument(
        "--versions", required=True, help="of vLLM and the plugin; lm-eval, PyTorch and transformers are recorded"
    )
    parser.add_argument("--table", type=Path, default=RESULTS)
    parser.add_argument("--dry", action="store_true", help="print the rows, append nothing")
    args = parser.parse_args()
    origin = {"date": datetime.date.today().isoformat(), "device": args.device, "versions": args.versions}
    rows = table(args.folder, args.exact, {**origin, "model": args.model})
    for row in rows:
        print(*(row[k] for k in COLUMNS[4:]), sep="  ")
    if not args.dry:
        with args.table.open("a", newline="") as f:
            csv.DictWriter(f, COLUMNS, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    main()
