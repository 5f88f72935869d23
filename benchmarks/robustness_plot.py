# SPDX-License-Identifier: Apache-2.0
"""The robustness study's section of the results page, and its plot: amount and kind of text, LoRA, first tokens."""

from __future__ import annotations

from pathlib import Path

from benchmarks.report_tables import Row, newest, provenance, read, table

KEY = ("model", "study", "setting", "text", "bits", "context")
TOKENS = 2048  # of a window
KINDS = ("prose", "code", "chat", "german")


def rows() -> list[Row]:
    """Newest row of every measurement."""
    return newest(read("robustness"), KEY)


def kl_table(found: list[Row], first: str) -> str:
    """KL by setting (down) and text and bits (across)."""
    texts = sorted({r["text"] for r in found}, key=KINDS.index)
    columns = [(b, t) for b in sorted({r["bits"] for r in found}, reverse=True) for t in texts]
    cells = {(r["setting"], r["bits"], r["text"]): f"{float(r['kl']):.4f}" for r in found}
    columns = [c for c in columns if any((s, *c) in cells for s in {r["setting"] for r in found})]
    settings = sorted(dict.fromkeys(r["setting"] for r in found), key=lambda s: int(s) if s.isdigit() else 0)
    lines = [[s, *(cells.get((s, b, t), "") for b, t in columns)] for s in settings]
    return table([first, *(f"{t}, {b} bits" for b, t in columns)], lines)


def of_domain(found: list[Row], windows: str) -> list[Row]:
    """The domain study of so many windows, with the equally large mixed calibration of the data study."""
    study = {"1": "domain", "8": "domain8"}[windows]
    mixed = [{**r, "setting": "mixed"} for r in found if r["study"] == "data" and r["setting"] == windows]
    rows = [r for r in found if r["study"] == study]
    return mixed + rows if rows else []


def draw(found: list[Row], path: Path) -> None:
    """Two panels: KL against the amount of text, and KL by what was calibrated on (both per kind of text read)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    data = [r for r in found if r["study"] == "data"]
    for bits, style in (("4", "--"), ("3", "-")):
        for n, text in enumerate(dict.fromkeys(r["text"] for r in data)):
            line = sorted((int(r["setting"]), r) for r in data if r["bits"] == bits and r["text"] == text)
            if not line:
                continue
            left.errorbar(
                [w * TOKENS for w, _ in line], [float(r["kl"]) for _, r in line],
                [float(r["kl_se"]) for _, r in line], fmt=f"o{style}", color=f"C{n}", label=f"{text}, {bits} bits",
                capsize=2,
            )  # fmt: skip
    left.set(
        xscale="log",
        yscale="log",
        xlabel="tokens calibrated on: windows x 2,048",
        ylabel="KL, nats per token",
    )
    left.set_title("Amount of text")
    left.legend(fontsize="small", ncol=2)
    left.set_ylim(top=0.05)
    domain = [r for r in of_domain(found, "8") or of_domain(found, "1") if r["bits"] == "3"]
    texts, kinds = (
        sorted({r["text"] for r in domain}, key=KINDS.index),
        list(dict.fromkeys(r["setting"] for r in domain)),
    )
    for n, kind in enumerate(kinds):
        mine = {r["text"]: float(r["kl"]) for r in domain if r["setting"] == kind}
        at = [i + n / (len(kinds) + 1) for i, t in enumerate(texts) if t in mine]
        right.bar(at, [mine[t] for t in texts if t in mine], 1 / (len(kinds) + 1), label=kind)
    right.set_xticks([i + (len(kinds) - 1) / 2 / (len(kinds) + 1) for i in range(len(texts))], texts)
    right.set(xlabel="text that is read", ylabel="KL, nats per token", title="Kind of text, 3 bits")
    right.legend(title="calibrated on", fontsize="small")
    figure.savefig(path, dpi=150)


def section(images: Path) -> str:
    """Markdown of the section; empty without rows."""
    found = rows()
    if not found:
        return ""
    draw(found, images / "robustness.png")

    def of(study: str) -> list[Row]:
        return [r for r in found if r["study"] == study]

    parts = [
        "## Robustness of the calibration",
        "KL to the exact cache, nats per token, of the last 256 tokens of 2,048, with the window and class-bit sinks; "
        "one held-out text per kind. Compare down a column: all rows of one read the same tokens.",
        "![KL against the amount and the kind of calibration text](images/robustness.png)",
        "### Amount of text: windows of 2,048 tokens, prose, code and one chat in eight",
        kl_table(of("data"), "windows"),
    ]
    for windows, name in (("8", "eight windows"), ("1", "one window (3,072 tokens)")):
        if rows_of := of_domain(found, windows):
            parts += [f"### Kind of text: {name} of it", kl_table(rows_of, "calibrated on")]
    if of("first"):
        parts += ["### First tokens (64 windows without BOS)", kl_table(of("first"), "text opens with")]
    if of("lora"):
        parts += [
            "### LoRA: a random adapter of rank 16, so large against each attention weight",
            kl_table(of("lora"), "adapter"),
        ]
    ratios = [float(r["logit_error"]) / float(r["predicted_logit_error"]) for r in of("data")]
    parts += [
        f"Measured over predicted logit error in the first table: {min(ratios):.2f} to {max(ratios):.2f}.",
        provenance(found),
    ]
    return "\n\n".join(parts)
