# SPDX-License-Identifier: Apache-2.0
"""Fit the kernel times in results/decode_attention.csv to the few numbers `kqsvd plan` predicts speed from.

    python -m benchmarks.decode_fit        writes vllm_kqsvd/decode_speed.json and prints the residuals

What a step takes beside attention comes from results/step_profile.csv.

Per format: microseconds = fixed + tokens * per_token + requests * per_request, all at least 0, least squares of the
relative error over rows with equal lengths and one query token. A row measured again replaces the earlier one.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

import vllm_kqsvd

RESULTS = Path(__file__).parent / "results" / "decode_attention.csv"
PROFILE = RESULTS.with_name("step_profile.csv")
OUT = Path(vllm_kqsvd.__file__).with_name("decode_speed.json")
KV_ELEMENTS = 2 * 8 * 128  # of the table's shape: 8 KV heads, head_dim 128
NAMES = {"fa3_bf16": "bf16", "fa3_fp8": "fp8"}
WEIGHT_BYTES_PER_US = 2.8e6  # near the best rate any kernel of the table reads at
PROFILED = {"llama-3.1-8b": (32, 16.06e9)}  # layers, bytes of weights


def name_of(kernel: str) -> str | None:
    """Name in the fit: ours by bytes per token and head; None for other kernels."""
    return NAMES.get(kernel) or (f"kqsvd_{kernel}" if kernel.startswith("d128_b") and "_" not in kernel[5:] else None)


def latest(path: Path = RESULTS) -> dict[str, dict[tuple[int, int], dict]]:
    """format -> (batch, context) -> the newest row."""
    out: dict[str, dict[tuple[int, int], dict]] = {}
    with path.open(newline="") as f:
        for row in csv.DictReader(f):
            name = name_of(row["format"]) if row["command"] != "not recorded" else None  # those are of older kernels
            if name and row["lengths"] == "equal" and row.get("query_len", "1") in ("", "1"):
                out.setdefault(name, {})[int(row["batch"]), int(row["context"])] = row
    return out


def fit(rows: dict[tuple[int, int], dict]) -> tuple[dict, dict[tuple[int, int], float]]:
    """(numbers of the model, relative error at every row)."""
    sizes = list(rows)
    us = np.array([float(rows[s]["us"]) for s in sizes])
    features = np.array([(1.0, batch * context / 1000, batch) for batch, context in sizes])
    x, _ = nnls(features / us[:, None], np.ones(len(us)))
    errors = dict(zip(sizes, (features @ x / us - 1).round(3).tolist(), strict=True))
    keys = ("fixed", "per_1k_tokens", "per_request")
    return {"bits": float(rows[sizes[0]]["bits"]), **dict(zip(keys, x.round(5).tolist(), strict=True))}, errors


def step_rest(path: Path = PROFILE) -> dict[str, float]:
    """What profiled steps take beside attention and reading the weights: fixed, and per request."""
    with path.open(newline="") as f:
        rows = [(float(r["users"]), r) for r in csv.DictReader(f) if r["model"] in PROFILED]
    rest = []
    for _, row in rows:
        layers, weights = PROFILED[row["model"]]
        attention = layers * float(row["attention_us_per_layer"])
        rest.append(1000 * float(row["step_ms"]) - attention - weights / WEIGHT_BYTES_PER_US)
    x, _ = nnls(np.array([(1.0, users) for users, _ in rows]), np.array(rest))
    return dict(zip(("fixed_us", "us_per_request"), x.round(2).tolist(), strict=True))


def speed_table(path: Path = RESULTS) -> tuple[dict, dict]:
    """(the JSON `kqsvd plan` reads, relative errors by format)."""
    found = {name: rows for name, rows in latest(path).items() if len(rows) >= 5}
    fits = {name: fit(rows) for name, rows in sorted(found.items())}
    newest = max((row for rows in found.values() for row in rows.values()), key=lambda row: row["date"])
    return {
        "device": newest["device"],
        "date": newest["date"],
        "versions": f"torch {newest['torch']}" + (f", vllm {newest['vllm']}" if newest["vllm"] else ""),
        "command": "python -m benchmarks.decode_attention; python -m benchmarks.decode_fit",
        "kv_elements": KV_ELEMENTS,
        "formats": {name: numbers for name, (numbers, _) in fits.items()},
        "step": {"weight_bytes_per_us": WEIGHT_BYTES_PER_US, **step_rest()},
    }, {name: errors for name, (_, errors) in fits.items()}


def main() -> None:
    """Write the table; print how well it fits."""
    table, errors = speed_table()
    OUT.write_text(json.dumps(table, indent=1) + "\n")
    for name, found in errors.items():
        print(name, table["formats"][name])
        print("  " + ", ".join(f"{b} x {c}: {e:+.0%}" for (b, c), e in sorted(found.items())))


if __name__ == "__main__":
    main()
