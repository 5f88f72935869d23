# SPDX-License-Identifier: Apache-2.0
"""The claims of the papers this project builds on, measured on a real model.

    python -m benchmarks.papers MODEL --data FILE... --held-out FILE... [--statistics FILE]

KQ-SVD (arXiv 2512.05916): truncated keys and values at equal rank, KQ-SVD against K-SVD and Eigen; keys scaled up by
alpha and queries down. SVDq (arXiv 2502.15304): keys at 2.25 and 1.25 bits in the axes of the prompt's own SVD against
per-channel quantization at the same bits, and this project's coder at fewer. Rows go to benchmarks/results/papers.csv.

To read beside the SVDq rows: its bits are those of the codes alone. Its basis and ranges belong to one text, and at n
tokens of head_dim d take 16 (d + 2) / n further bits per element (1.4 at 764 tokens of 64 channels); ours come once per
model, are fitted on other text than the one measured, for the metric of the whole model, and count their scale bytes.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

from benchmarks.fidelity import installed, shown
from benchmarks.papers_coders import SVDQ_SCHEDULES, our_keys, per_channel, svdq
from benchmarks.papers_plot import plot
from vllm_kqsvd.calibration.basis import kqsvd_factors
from vllm_kqsvd.calibration.capture import AttentionCall, load_model, observe
from vllm_kqsvd.calibration.collect import before_rope
from vllm_kqsvd.calibration.corpus import Corpus
from vllm_kqsvd.calibration.model_probe import LayerInfo, probe

RESULTS = Path(__file__).parent / "results" / "papers.csv"
COLUMNS = "date device versions command model experiment layer method setting metric value".split()
EPSILON = 0.1  # relative Frobenius error of the keys at which the papers' repository chooses ranks
ALPHAS = (1, 2, 4, 6, 8, 10)
SVDQ_BITS = tuple(SVDQ_SCHEDULES)


@dataclass
class Layer:
    """What one layer saw: q [Hq, N, d], k and v [H, N, d] float64 after RoPE, keys before RoPE, window boundaries."""

    info: LayerInfo
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_before: torch.Tensor

    def grouped(self) -> torch.Tensor:
        """Queries stacked per KV head: [H, g N, d]."""
        return self.q.reshape(self.k.shape[0], -1, self.q.shape[-1])

    def output_gram(self) -> torch.Tensor:
        """sum over the group of W_O W_O^T, [H, d, d]."""
        w = self.info.output_weight()
        assert w is not None
        w = w.reshape(self.k.shape[0], self.info.group, self.k.shape[-1], -1)
        return torch.einsum("hgdm,hgem->hde", w, w)


def record(model, layers: list[LayerInfo], ids: list[int]) -> list[Layer]:
    """One window of text through the model."""
    seen: list[AttentionCall] = []
    with torch.no_grad(), observe(seen.append):
        model.base_model(input_ids=torch.tensor([ids]), use_cache=False)
    return [
        Layer(info, c.q.double(), c.k.double(), c.v.double(), before_rope(c.k, info.rope).double())
        for info, c in zip(layers, seen, strict=True)
    ]


def joined(windows: list[list[Layer]]) -> list[Layer]:
    """The windows' tokens one after another, first tokens (sinks) left out of the calibration."""
    out = []
    for parts in zip(*windows, strict=True):
        tensors = [torch.cat([getattr(p, n)[:, 4:] for p in parts], 1) for n in ("q", "k", "v", "k_before")]
        out.append(Layer(parts[0].info, *tensors))
    return out


def gram(x: torch.Tensor) -> torch.Tensor:
    """x^T x per head."""
    return x.mT @ x


def axes(second_moment: torch.Tensor) -> torch.Tensor:
    """Eigenvectors [H, d, d], largest eigenvalue first."""
    return torch.linalg.eigh(second_moment)[1].flip(-1)


def rank_at(second_moment: torch.Tensor, epsilon: float = EPSILON) -> int:
    """Smallest rank at which the head-averaged relative Frobenius error of principal axes is at most epsilon."""
    w = torch.linalg.eigvalsh(second_moment).flip(-1).clamp_min(0)
    tail = 1 - w.cumsum(-1) / w.sum(-1, keepdim=True)
    error = tail.clamp_min(0).sqrt().mean(0)
    return 1 + int((error > epsilon).sum())


def projectors(method: str, k: torch.Tensor, q: torch.Tensor, rank: int) -> torch.Tensor:
    """P [H, d, d] with K P the keys as attention sees them, from the second moments of keys and of queries.

    K-SVD and Eigen project on axes of the keys, or of keys and queries together; KQ-SVD gives the best rank-R K Q^T.
    """
    if method == "kqsvd":
        a, b, _ = kqsvd_factors(k, q)
        return a[..., :rank] @ b[..., :rank].mT
    u = axes(k if method == "ksvd" else k + q)[..., :rank]
    return u @ u.mT


def relative(error: torch.Tensor, of: torch.Tensor) -> float:
    """Relative Frobenius error."""
    return float(error.norm() / of.norm())


def attention(layer: Layer, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits, probabilities, output after W_O) of a causal layer with keys k and values v."""
    group = layer.info.group
    logits = layer.q @ k.repeat_interleave(group, 0).mT * layer.info.scale
    n = logits.shape[-1]
    p = logits.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)
    w = layer.info.output_weight()
    return logits, p, torch.einsum("htd,hdm->tm", p @ v.repeat_interleave(group, 0), w)


Row = tuple[str, int, str, str, str, float]


def equal_rank(fit: Layer, held: Layer, index: int) -> Iterator[Row]:
    """KQ-SVD, K-SVD and Eigen at the ranks K-SVD needs for EPSILON; errors on the fitted text and on held-out text."""
    kk, qq, vv, oo = gram(fit.k), gram(fit.grouped()), gram(fit.v), fit.output_gram()
    rank_k, rank_v = rank_at(kk), rank_at(vv)
    exact = attention(held, held.k, held.v)
    for method in ("kqsvd", "ksvd", "eigen"):
        pk, pv = projectors(method, kk, qq, rank_k), projectors(method, vv, oo if method == "kqsvd" else 0 * oo, rank_v)
        setting = f"rank {rank_k}+{rank_v}"
        for text, x in (("fitted", fit), ("held out", held)):
            # |K P Q^T - K Q^T| from second moments: trace((P - I)^T K^T K (P - I) Q^T Q)
            left = pk - torch.eye(pk.shape[-1], dtype=pk.dtype)
            k2, q2 = gram(x.k), gram(x.grouped())
            error = torch.einsum("hab,hac,hcd,hdb->", left, k2, left, q2) / torch.einsum("hab,hba->", k2, q2)
            yield "equal rank", index, method, setting, f"QK^T {text}", float(error.clamp_min(0).sqrt())
        found = attention(held, held.k @ pk, held.v @ pv)
        for name, got, want in zip(("softmax", "attention output"), found[1:], exact[1:], strict=True):
            yield "equal rank", index, method, setting, f"{name} held out", relative(got - want, want)
    for alpha in ALPHAS:
        for method in ("kqsvd", "ksvd", "eigen"):
            p = projectors(method, kk * alpha**2, qq / alpha**2, rank_k) - torch.eye(kk.shape[-1], dtype=kk.dtype)
            error = torch.einsum("hab,hac,hcd,hdb->", p, kk, p, qq) / torch.einsum("hab,hba->", kk, qq)
            yield "unbalance", index, method, f"alpha {alpha}", "QK^T fitted", float(error.clamp_min(0).sqrt())


def few_bits(held: Layer, index: int, ours: dict[str, torch.Tensor]) -> Iterator[Row]:
    """Keys before RoPE at SVDq's bits. `ours`: the same keys as decoded from this project's pages, by setting."""
    k = held.k_before[:, 4:]
    gram_q = gram(before_rope(held.q, held.info.rope)[:, 4:].reshape(k.shape[0], -1, k.shape[-1]).double())
    found = {}
    for bits in SVDQ_BITS:
        found["svdq", f"{bits} bits"] = svdq(k, bits)
        found["per channel", f"{bits} bits"] = per_channel(k, bits)
    found |= {("ours", setting): x[:, 4:] for setting, x in ours.items()}
    centred = k - k.mean(1, keepdim=True)
    for (method, setting), got in found.items():
        error = got - k
        yield "keys", index, method, setting, "squared error of K", float(error.square().sum() / centred.square().sum())
        logit = torch.einsum("hnd,hde,hne->", error, gram_q, error)
        whole = torch.einsum("hnd,hde,hne->", centred, gram_q, centred)
        yield "keys", index, method, setting, "squared error of QK^T", float(logit / whole)


def main() -> None:
    """Measure, append, plot."""
    options = parse()
    tokenizer = AutoTokenizer.from_pretrained(str(options.model))
    model = load_model(str(options.model), "cpu", torch.float32)
    layers = probe(model)
    ours = our_keys(layers, options.statistics, SVDQ_BITS) if options.statistics else {}
    fit = Corpus(options.data, tokenizer, options.length, chat=False)
    fitted = joined([record(model, layers, fit.window(i)) for i in range(options.windows)])
    held = record(model, layers, Corpus(options.held_out, tokenizer, options.length, seed=1, chat=False).window(0))
    rows: list[Row] = []
    for i, (a, b) in enumerate(zip(fitted, held, strict=True)):
        rows += equal_rank(a, b, i)
        rows += few_bits(b, i, {setting: code(i, b.k_before) for setting, code in ours.items()})
        print(f"layer {i}", file=sys.stderr, flush=True)
    save(rows, options)
    if options.plot:
        plot(rows, options.plot)


def save(rows: list[Row], options: argparse.Namespace) -> None:
    """Append the rows to the CSV, and print the means over layers."""
    same = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": f"cpu {platform.machine()}",
        "versions": "; ".join(f"{p} {installed(p)}" for p in ("vllm_kqsvd", "torch", "transformers")),
        "command": "python -m benchmarks.papers " + shlex.join(shown(sys.argv[1:])),
        "model": options.model.name,
    }
    new = not options.output.exists()
    with options.output.open("a", newline="") as f:
        writer = csv.writer(f, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        for *row, value in rows:
            writer.writerow([*same.values(), *row, f"{value:.6g}"])
    means: dict[tuple[str, str, str, str], list[float]] = {}
    for experiment, _, method, setting, metric, value in rows:
        where = "" if experiment == "equal rank" else setting
        means.setdefault((experiment, where, metric, method), []).append(value)
    for key, values in sorted(means.items()):
        print(*key, f"{sum(values) / len(values):.4f}", sep=" | ")


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="text the bases are fitted on")
    parser.add_argument("--held-out", type=Path, nargs="+", required=True, help="text the errors are measured on")
    parser.add_argument("--statistics", type=Path, help="statistics of a calibration, for this project's rows")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
