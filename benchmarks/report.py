# SPDX-License-Identifier: Apache-2.0
"""The results page: docs/results.md and its plots, from benchmarks/results/*.csv.

    python -m benchmarks.report        (needs matplotlib; no GPU, no model)

Of rows measured again the newest is shown; the CSVs keep all of them. Also refits the table `kqsvd plan` predicts
decode speed from.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from benchmarks import (
    decode_fit,
    decode_plot,
    fidelity_plans,
    fidelity_plot,
    report_tasks,
    robustness_plot,
    serving_plot,
    speed_plot,
)
from benchmarks.report_tables import (
    PROVENANCE,
    RESULTS,
    Row,
    newest,
    number,
    pivot,
    provenance,
    read,
    recorded,
    table,
)

DOCS = Path(__file__).resolve().parents[1] / "docs"
IMAGES = DOCS / "images"
SHOWN = {"decode_attention", "fidelity", "fidelity_tasks", "robustness", "serving", "serving_load", "store_latent"}
LONGEST = 40  # rows of a table on the page
HEADER = """# Results

Made by `python -m benchmarks.report` from the CSV files under [benchmarks/results](../benchmarks/results);
do not edit. Bits count scales. Compare within a table: hardware, versions, date and command stand under it.
"""
LOAD_TEXT = (
    "`vllm bench serve` against `vllm serve`, prompts included, every format with the same bytes of cache. The client "
    'keeps so many requests open ("at a time"); what does not fit the cache waits, as the time to the first token '
    'shows. "Ran at once" is the most that the server itself reported.'
)
CPU_TEXT = (
    "On a CPU these rows show how many requests each cache admits, and that serving under load works. They say nothing "
    "about speed on a GPU: the plugin's CPU path expands each request's history in PyTorch, so a step takes several "
    "times as long as vLLM's and fewer tokens come per second however many requests run. Whole blocks, exact windows "
    "included, are why the admitted numbers differ from those of the bits. The formats took turns at every load, "
    "beside other programs that became fewer (`machine_load` in the CSV: 14 at the first row, 3 to 5 from 12 at a time "
    "on), so the rows of 4 at a time compare least."
)


def image(name: str, text: str) -> str:
    """Markdown of a plot."""
    return f"![{text}](images/{name}.png)"


def decode_section() -> str:
    """Decode attention: time against context, and every size as a table."""
    keys = ("device", "batch", "context", "lengths", "query_len", "format")
    rows = [r for r in newest(read("decode_attention"), keys) if r["format"] in decode_plot.FORMATS]
    for row in rows:
        row["batch x context"] = f"{row['batch']} x {row['context']}" + ("" if row["lengths"] == "equal" else " in all")
        if row["lengths"] != "equal":
            row["batch x context"] += f", {row['lengths']}"
        if row["query_len"] != "1":
            row["batch x context"] += f", {row['query_len']} query tokens"
    rows.sort(key=lambda r: (r["query_len"], r["lengths"], int(r["batch"]), int(r["context"])))
    decode_plot.main([str(IMAGES / "decode_time.png")])
    speed_plot.main([str(IMAGES / "decode_bars.png")])
    head, lines = pivot(rows, ["batch x context"], "format", "us", list(decode_plot.FORMATS))
    labels = [decode_plot.FORMATS[h][0] if h in decode_plot.FORMATS else h for h in head]
    return "\n\n".join(
        [
            "## Decode attention: speed against context",
            "Microseconds per layer, everything included: frames, scales, exact window, merge, value basis. "
            "32 query heads, 8 KV heads, head_dim 128; random fills.",
            image("decode_bars", "decode speed over FlashAttention 3 in bf16, by batch and context"),
            image("decode_time", "decode time against context"),
            table(labels, lines),
            provenance(rows, "python -m benchmarks.decode_attention"),
        ]
    )


def fidelity_section() -> str:
    """KL against bits beside every peer: one plot and table per model and context."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in read("fidelity"):
        if "(" not in row["method"] and "(" not in row["text"]:
            groups[row["model"], row["context"]].append(row)
    parts = [
        "## Fidelity: KL against bits",
        "KL of the next token's distribution to the model's own exact cache, nats per token, mean of the texts. "
        '"Recent exact": the last 64 tokens, and 4 sinks for the others where ours has its class bit.',
    ]
    for (model, context), rows in sorted(groups.items()):
        rows = fidelity_plot.on_common_texts(newest(rows, ("text", "method", "bits", "window")))
        name = f"fidelity_{model}_{context}".replace("/", "-")
        arguments = [str(IMAGES / f"{name}.png"), "--model", model, "--context", context]
        subprocess.run([sys.executable, "-m", "benchmarks.fidelity_plot", *arguments], check=True)
        head = ["method", "bits", "KL, recent exact", "KL, nothing exact", "top-1, recent exact"]
        texts = ", ".join(sorted({r["text"] for r in rows}))
        parts += [
            f"### {model}, {context} tokens",
            image(name, f"KL against bits, {model}, {context} tokens"),
            table(head, fidelity_lines(rows)),
            f"Texts: {texts}.",
            provenance(rows),
        ]
    return "\n\n".join(parts)


def served_section() -> str:
    """KL of every cache as vLLM itself serves it (fidelity_engine.py), and the harness on the same tokens."""
    rows = [r for r in read("fidelity") if "fidelity_engine" in r["command"]]
    if not rows:
        return ""
    found: dict[tuple[str, str, str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in newest(rows, ("model", "context", "text", "method")):
        name, _, how = row["method"].rstrip(")").partition(" (")
        how, _, kind = how.partition(", ")
        entry = found[row["model"], row["context"], name, kind or "bfloat16"]
        entry["bits"].append(float(row["bits"]))
        for figure in ("kl", "top1"):
            entry[f"{figure} {how}"].append(float(row[figure]))

    def mean(values: list[float], digits: int) -> str:
        return f"{sum(values) / len(values):.{digits}f}" if values else ""

    head = ["model", "context", "KV cache", "served in", "bits", "KL", "top-1", "KL, harness"]
    lines = [
        [*key, mean(e["bits"], 2), mean(e["kl vLLM"], 5), mean(e["top1 vLLM"], 4), mean(e["kl offline"], 5)]
        for key, e in sorted(found.items(), key=lambda x: (x[0][0], int(x[0][1]), -x[1]["bits"][0], x[0]))
    ]
    text = (
        "Served by vLLM, prompts read in steps of 64 tokens, against the model's exact float32 pass: arithmetic in 16 "
        "bits is part of the KL (the bf16 rows show how much). The harness quantizes the same tokens in float32."
    )
    return "\n\n".join(["## Fidelity through vLLM", text, table(head, lines), provenance(rows)])


def fidelity_lines(rows: list[Row]) -> list[list[str]]:
    """One line per method, by bits: mean KL over the texts with and without exact recent tokens."""
    found: dict[tuple[str, float], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        entry = found[row["method"], float(row["bits"])]
        kind = "recent" if int(row["window"]) else "nothing"
        entry[kind].append(float(row["kl"]))
        if row["top1"]:
            entry["top1 " + kind].append(float(row["top1"]))

    def mean(values: list[float]) -> str:
        return f"{sum(values) / len(values):.4f}" if values else ""

    return [
        [method, f"{bits:.2f}", mean(e["recent"]), mean(e["nothing"]), mean(e["top1 recent"])]
        for (method, bits), e in sorted(found.items(), key=lambda x: -x[0][1])
    ]


def serving_section() -> str:
    """Throughput at a full cache."""
    full = newest(
        read("serving"), ("device", "model", "format", "tensor_parallel", "input_len", "output_len", "requests")
    )
    head = ["model", "GPUs", "KV cache", "bits", "KV tokens", "requests", "tokens each", "output tok/s"]
    head.append("of decoding alone")
    lines = [
        [
            r["model"], r["tensor_parallel"] or "1", r["format"].replace("auto", "bf16"), number(r["bits"], 2),
            number(r["kv_tokens"]), r["requests"], f"{r['input_len']} + {r['output_len']}",
            number(r["tok_s"]), number(r["decode_tok_s"]),
        ]
        for r in full
    ]  # fmt: skip
    text = (
        "Requests start with their context in the cache; random weights and bases of the model's shape. The filling "
        "of the cache by the benchmark, which no server does, is part of the time of the output tokens; of decoding "
        "alone it is taken off: as measured by the same requests with one token each, or, where the requests are as "
        "many as the cache holds (`--requests full`), by timing the steps in which all of them run."
    )
    return "\n\n".join(["## Throughput at a full cache", text, table(head, lines), provenance(full)])


def load_section() -> str:
    """Throughput against latency under load."""
    rows = serving_plot.load_rows()
    title = "## Under load: throughput against latency"
    if not rows:
        return f"{title}\n\nNo rows yet."
    serving_plot.draw(rows, IMAGES / "serving_load.png")
    head = ["model", "load", "at a time", "KV cache", "bits", "KV tokens", "ran at once", "output tok/s"]
    head += ["TTFT p50, ms", "p99", "ms per token p50", "p99"]
    lines = [
        [
            r["model"], f"{r['requests']} x {serving_plot.load_name(r)}", str(serving_plot.at_a_time(r)),
            r["format"].replace("auto", "bf16") + "*" * uncompiled(r), number(r["bits"], 2), number(r["kv_tokens"]),
            r["running"], number(r["tok_s"], 1), *(number(r[k]) for k in ("ttft_p50", "ttft_p99")),
            *(number(r[k], 1) for k in ("tpot_p50", "tpot_p99")),
        ]
        for r in rows
    ]  # fmt: skip
    parts = [title, LOAD_TEXT, image("serving_load", "throughput against latency"), table(head, lines)]
    if any(uncompiled(r) for r in rows):
        parts.append("\\* Served without torch.compile: compare the milliseconds per token with rows so marked alone.")
    if any(r["device"].startswith("CPU") for r in rows):
        parts.append(CPU_TEXT)
    return "\n\n".join([*parts, provenance(rows)])


def uncompiled(row: Row) -> bool:
    """Whether the server of a load ran without torch.compile, which is on unless asked otherwise."""
    return re.search(r"compilation-config.{0,12}mode\W{1,8}0", row["command"]) is not None


def robustness_section() -> str:
    """What a projection owes to the text it was calibrated on."""
    return robustness_plot.section(IMAGES)


def store_section() -> str:
    """Storing one step's tokens. Rows without a command are of an older kernel and stay in the CSV."""
    rows = newest(list(filter(recorded, read("store_latent"))), ("device", "bits", "tokens", "arm"))
    head, lines = pivot(rows, ["bits", "tokens"], "arm", "us", list(dict.fromkeys(r["arm"] for r in rows)))
    parts = ["## Storing", "Microseconds per layer for a step's tokens (rotate, project, scale, pack; vLLM: copy)."]
    return "\n\n".join([*parts, table(head, lines), provenance(rows, "python -m benchmarks.store_latent")])


def other_sections() -> str:
    """Every further CSV as it is; a long one as a link, and with the plots that carry its name."""
    parts = []
    for path in sorted(RESULTS.glob("*.csv")):
        rows = read(path.stem) if path.stem not in SHOWN else []
        if not rows:
            continue
        head = [k for k in rows[0] if k not in PROVENANCE]
        lines = [[str(r[k] or "") for k in head] for r in rows]
        where = f"{len(rows)} rows in [{path.name}](../benchmarks/results/{path.name}): {', '.join(head)}."
        plots = [image(p.stem, path.stem) for p in sorted(IMAGES.glob(f"{path.stem}_*.png"))]
        body = table(head, lines) if len(rows) <= LONGEST else where
        parts += [f"## {path.stem.replace('_', ' ').capitalize()}", *plots, body, provenance(rows)]
    return "\n\n".join(parts)


def main() -> None:
    """Write the page, its plots and the speed table."""
    IMAGES.mkdir(exist_ok=True)
    decode_fit.main()
    sections = (
        serving_section,
        load_section,
        decode_section,
        fidelity_section,
        fidelity_plans.section,
        served_section,
        report_tasks.section,
        robustness_section,
        store_section,
        other_sections,
    )
    page = "\n\n".join([HEADER.rstrip(), *filter(None, (s() for s in sections))])
    (DOCS / "results.md").write_text(page + "\n")


if __name__ == "__main__":
    main()
