# SPDX-License-Identifier: Apache-2.0
"""Section of the results page on tasks: right answers and perplexity of each cache, score ± standard error."""

from __future__ import annotations

from collections import defaultdict

from benchmarks.lm_eval_results import RATIO
from benchmarks.report_tables import Row, newest, provenance, read, table

TEXT = (
    "Score ± its standard error over problems, passages or documents, in brackets how many. HumanEval is pass@1, RULER "
    "the share of wanted strings of all its tasks, the last word (of passages of 512 tokens) the share of right ones. "
    "Perplexity is over that of the exact cache on the same documents or passages, its error that of the ratio; "
    "perplexities themselves, which differ far more between documents than between caches, are in the CSV."
)


def cell(row: Row) -> str:
    """Score ± standard error (samples), in as many digits as its kind has."""
    digits = 4 if row["task"].endswith(RATIO) else 3
    return f"{float(row['score']):.{digits}f} ± {float(row['standard_error']):.{digits}f} ({row['samples']})"


def title(task: str) -> str:
    """Column head of a task."""
    return task.removesuffix(RATIO).removeprefix("lm-eval ") + (", perplexity ratio" if task.endswith(RATIO) else "")


def section() -> str:
    """Two tables a model: right answers, and perplexity over the exact cache's."""
    kept = [r for r in read("fidelity_tasks") if not r["task"].endswith(", perplexity")]
    rows = newest(kept, ("model", "cache", "task"))
    if not rows:
        return ""
    parts = ["## Tasks", TEXT]
    groups: dict[tuple[str, bool], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["model"], row["task"].endswith(RATIO)].append(row)
    for (model, ratio), group in sorted(groups.items()):
        tasks = sorted({r["task"] for r in group}, key=lambda t: (len(t), t))
        caches: dict[str, dict[str, str]] = {}
        for row in group:
            caches.setdefault(row["cache"], {})[row["task"]] = cell(row)
        lines = [[c, *(found.get(t, "") for t in tasks)] for c, found in caches.items()]
        heads = ["cache", *map(title, tasks)]
        parts += [f"### {model}: {'perplexity' if ratio else 'right answers'}", table(heads, lines), provenance(group)]
    return "\n\n".join(parts)
