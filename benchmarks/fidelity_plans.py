# SPDX-License-Identifier: Apache-2.0
"""The results page's table of what compiled plans cost: rows of `fidelity.py --note CPU`, beside those of the same text
with any plan and with one compiled plan per width."""

from __future__ import annotations

from benchmarks.report_tables import newest, provenance, read, table

NOTE = " (CPU)"
COMPILED = "-replanned-compiled"
KEYS = ("model", "context", "text", "method", "window")


def section() -> str:
    """Markdown, empty if there are no such rows."""
    rows = {tuple(r[k] for k in KEYS): r for r in newest(read("fidelity"), KEYS) if int(r["window"])}
    lines, shown = [], []
    for (model, context, text, method, window), row in rows.items():
        if not method.endswith(NOTE):
            continue
        shown.append(row)
        if not method.endswith(COMPILED + NOTE):
            continue
        name = method.removesuffix(COMPILED + NOTE)

        def kl(other: str, where: tuple[str, ...] = (model, context, text), window: str = window) -> str:
            found = rows.get((*where, other, window))
            return f"{float(found['kl']):.5f}" if found else ""

        others = (name, name + NOTE, name + "-replanned-free" + NOTE, name + "-catalogue")
        lines.append([model, context, text, f"{float(row['bits']):.2f}", kl(method), *map(kl, others)])
    if not lines:
        return ""
    head = ["model", "context", "text", "bits", "compiled plans (CPU)", "any plan", "any plan (CPU)"]
    head += ["any plan, replanned (CPU)", "one compiled plan per width"]
    about = (
        "KL with the last 64 tokens exact. Compiled plans: each layer has the best of those with a CUDA decode kernel, "
        "the calibrator's default, on the bases of the projections with any plan (`fidelity_replan.py`: steps fitted "
        "anew on 3,072 calibration tokens). The columns marked CPU were measured on one, in float32 as the others."
    )
    return "\n\n".join(["## Compiled plans", about, table(head, lines), provenance(shown)])
