# SPDX-License-Identifier: Apache-2.0
"""What `verify` found: pooled figures, per text and per layer, the verdict, and its three forms (text, JSON, plot)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from vllm_kqsvd.plan import layer_range
from vllm_kqsvd.verify_harness import Score

# KL in nats per token at 2k context that a good projection stays under, by stored bits per element.
KL_THRESHOLDS = {2.0: 0.06, 2.5: 0.027, 3.0: 0.012, 4.0: 0.004, 8.0: 0.001}
PREDICTION_FACTOR = 1.5  # measured logit error beyond this many times the predicted one: unlike the calibration text


def default_threshold(bits: float) -> float:
    """KL threshold for `bits` stored bits per element, log-linear between the rows of KL_THRESHOLDS."""
    known = sorted(KL_THRESHOLDS)
    bits = min(max(bits, known[0]), known[-1])
    high = next(b for b in known if b >= bits)
    low = max((b for b in known if b <= bits), default=high)
    if high == low:
        return KL_THRESHOLDS[high]
    part = (bits - low) / (high - low)
    return math.exp((1 - part) * math.log(KL_THRESHOLDS[low]) + part * math.log(KL_THRESHOLDS[high]))


def rms(values: Iterable[float]) -> float:
    """Root mean square."""
    squares = [x * x for x in values]
    return math.sqrt(sum(squares) / len(squares))


@dataclass(frozen=True)
class Fidelity:
    """Figures over `positions` predicted tokens of `windows` windows of one text, or of all of them."""

    text: str
    windows: int
    positions: int
    kl: float  # mean KL(exact || compressed), nats per token
    kl_se: float | None  # standard error of `kl` over windows; None for a single window
    kl_p99: float
    top1: float  # share of positions with the same most likely token
    perplexity: float
    perplexity_exact: float

    @classmethod
    def of(cls, text: str, scores: Sequence[Score]) -> Fidelity:
        """Pool the windows' scores, every position weighing the same."""
        kl = torch.cat([s.kl for s in scores])
        means = torch.stack([s.kl.mean() for s in scores])
        return cls(
            text,
            len(scores),
            kl.numel(),
            float(kl.mean()),
            float(means.std() / math.sqrt(len(scores))) if len(scores) > 1 else None,
            float(kl.quantile(0.99)),
            float(torch.cat([s.agree for s in scores]).mean()),
            math.exp(float(torch.cat([s.nll for s in scores]).mean())),
            math.exp(float(torch.cat([s.nll_reference for s in scores]).mean())),
        )

    def row(self) -> str:
        """One line of the table."""
        error = f" ± {self.kl_se:.4f}" if self.kl_se is not None else " " * 9
        change = self.perplexity / self.perplexity_exact - 1
        return (
            f"{self.text[:28]:<28} {self.positions:>7}  {self.kl:.4f}{error}  {self.kl_p99:.4f}  {self.top1:6.1%}"
            f"  {self.perplexity:8.2f} ({self.perplexity_exact:.2f}, {change:+.2%})"
        )


HEADER = "{:<28} {:>7}  {:<15}  {:<6}  {:>6}  {:>8} (exact, change)".format(
    "text", "tokens", "KL, nats/token", "p99", "top-1", "perplexity"
)


@dataclass(frozen=True)
class VerifyResult:
    """The whole answer of `verify`. Bits and ratios count codes and scales; `ratio_at_context` the window too."""

    model: str
    projection: str
    context: int
    window: int
    chunk: int
    bits: float
    ratio: float
    ratio_at_context: float
    threshold: float
    total: Fidelity
    texts: list[Fidelity]
    logit_error: dict[int, float]  # layer -> measured relative logit error
    predicted: dict[int, float] = field(default_factory=dict)  # layer -> the calibrator's prediction
    layer_bits: tuple[float, float] | None = None  # of the smallest and largest layer

    @property
    def passed(self) -> bool:
        """Whether the mean KL is at most the threshold. NaN fails."""
        return self.total.kl <= self.threshold

    @property
    def prediction_ratio(self) -> float | None:
        """Measured over predicted logit error, root mean square over the layers that have both."""
        both = self._predicted_layers()
        return rms(self.logit_error[i] for i in both) / rms(self.predicted[i] for i in both) if both else None

    def _predicted_layers(self) -> list[int]:
        return [i for i in self.logit_error if self.predicted.get(i)]

    def verdict(self) -> str:
        """What it means and what to do, in a sentence or two."""
        kl, total = f"KL {self.total.kl:.4f}", self.total
        limit = f"{self.threshold:.4f} nats per token for {self.bits:.2f} bits"
        if self.passed:
            out = f"PASS: {kl} is within {limit}; the most likely token is the same in {total.top1:.1%} of positions."
        else:
            out = (
                f"FAIL: {kl} exceeds {limit}. Calibrate on text like the one served (--data), "
                "with more bits (--bits) or more text, or accept it with --threshold."
            )
        if (ratio := self.prediction_ratio) and not 1 / PREDICTION_FACTOR <= ratio <= PREDICTION_FACTOR:
            out += (
                f" Logit error is {ratio:.2f} times what calibration predicted: "
                "this text is unlike the calibration text, or the file is not this model's."
            )
        return out

    def table(self) -> str:
        """The report for a terminal."""
        step = "token by token" if self.chunk == 1 else f"in steps of {self.chunk}"
        lines = [
            f"{self.projection} on {self.model}",
            f"{self.bits:.2f} bits per element{layer_range(*self.layer_bits or (0, 0))} ({self.ratio:.2f}x smaller; "
            f"{self.ratio_at_context:.2f}x at {self.context} tokens with the exact window of {self.window}), "
            f"read {step}",
            "",
            HEADER,
            *(t.row() for t in self.texts),
        ]
        if len(self.texts) > 1:
            lines.append(self.total.row())
        lines += ["", self.logit_line(), "", self.verdict()]
        return "\n".join(lines)

    def logit_line(self) -> str:
        """Measured against predicted relative logit error."""
        if not self.logit_error:
            return "no layer is compressed"
        worst = max(self.logit_error, key=self.logit_error.__getitem__)
        out = f"relative logit error {rms(self.logit_error.values()):.4f}"
        out += f" (worst {self.logit_error[worst]:.4f}, in layer {worst})"
        if both := self._predicted_layers():
            ratios = [self.logit_error[i] / self.predicted[i] for i in both]
            out += (
                f"; calibration predicted {rms(self.predicted[i] for i in both):.4f}: measured is "
                f"{self.prediction_ratio:.2f} times that ({min(ratios):.2f} to {max(ratios):.2f} by layer)"
            )
        return out

    def to_json(self) -> dict[str, object]:
        """Plain data, with the verdict."""
        return {
            **asdict(self),
            "passed": self.passed,
            "verdict": self.verdict(),
            "kl": self.total.kl,
            "top1": self.total.top1,
            "perplexity": self.total.perplexity,
            "perplexity_exact": self.total.perplexity_exact,
            "prediction_ratio": self.prediction_ratio,
        }


def plot(result: VerifyResult, kl: Mapping[str, torch.Tensor], path: Path) -> None:
    """Two panels: distribution of the per-token KL of every text, and logit error per layer with its prediction."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for text, values in kl.items():
        left.plot(values.sort().values.clamp_min(1e-7), torch.linspace(0, 1, values.numel()), label=text)
    left.axvline(result.threshold, color="black", linestyle=":", label="threshold of the mean")
    left.set(
        xscale="log",
        xlabel="KL, nats per token",
        ylabel="share of tokens below",
        title="Per-token KL",
    )
    layers = sorted(result.logit_error)
    right.plot(layers, [result.logit_error[i] for i in layers], "o-", label="measured")
    if result.predicted:
        right.plot(layers, [result.predicted.get(i, math.nan) for i in layers], "x--", label="predicted")
    right.set(xlabel="layer", ylabel="relative logit error", ylim=(0, None), title="Logit error")
    left.legend()
    right.legend()
    figure.savefig(path, dpi=150)
