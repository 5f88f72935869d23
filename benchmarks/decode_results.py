# SPDX-License-Identifier: Apache-2.0
"""Rows of benchmarks/results/decode_attention.csv: versions and ratios added, appended, printed."""

from __future__ import annotations

import csv
import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

FIELDS = (
    "date", "device", "torch", "vllm", "command", "batch", "context", "lengths", "query_len", "format", "bits", "us",
    "gb_per_s", "vs_bf16", "vs_fp8",
)  # fmt: skip


def ratios(rows: list[dict]) -> list[dict]:
    """Rows of one size with their speed against FlashAttention 3 in bf16 and fp8, where those were run."""
    base = {r["format"]: r["us"] for r in rows}
    out = []
    for r in rows:
        more = {
            key: round(base[name] / r["us"], 2) if name in base else ""
            for key, name in (("vs_bf16", "fa3_bf16"), ("vs_fp8", "fa3_fp8"))
        }
        out.append({**r, **more})
    return out


def table(rows: list[dict]) -> str:
    """One line per row, for the terminal."""
    return "\n".join(
        f"{r['size']:14s} {r['format']:16s} {r['bits']:5} b {r['us']:8} us {r['gb_per_s']:5} GB/s "
        f"{r['vs_bf16'] or '':>5} {r['vs_fp8'] or '':>5}"
        for r in ratios(rows)
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def append(path: str | Path, rows: list[dict], command: str) -> None:
    """Append rows (of any number of sizes) to the results file, with its header if it is new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    stamp = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "vllm": _version("vllm"),
        "command": command,
    }
    with path.open("a", newline="") as f:
        writer = csv.DictWriter(f, FIELDS, extrasaction="ignore", lineterminator="\n")
        if new:
            writer.writeheader()
        for size in dict.fromkeys(r["size"] for r in rows):
            for r in ratios([x for x in rows if x["size"] == size]):
                writer.writerow({**stamp, "lengths": "lognormal" if "log" in size else "equal", **r})
