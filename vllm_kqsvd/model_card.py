# SPDX-License-Identifier: Apache-2.0
"""README.md and spectrum.png of a projection folder: for people, never read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_kqsvd.inspect_projection import as_text, report
from vllm_kqsvd.projection import Projection

_TEXT = """\
# KV cache projection for {title}

Bases, means and bit plans with which vllm_kqsvd keeps the KV cache of this model in latent, mixed-bit form.
It holds no model weights and fits no other model.

```
vllm serve MODEL --attention-backend CUSTOM --additional-config '{{"kqsvd": {{"projection": "THIS_FOLDER"}}}}'
```

| | |
| --- | --- |
| bytes per token, whole model | {latent} (bf16: {plain}) |
| bits per element, scales counted | {bits:.2f} |
| compression ratio at {context} tokens per sequence, exact window of {window} tokens counted | {ratio:.2f} |
| digest | `{digest}` |

## Calibration

{calibration}

## Layers

`predicted` is the relative error of the attention logits that the calibrator expects; it was not measured in the
served model: `kqsvd verify` measures KL and perplexity.

```
{table}
```
{plot}"""
_PLOT = """
## Spectrum

![variance of the latent channels](spectrum.png)

Variance of the latent channels (mean over heads and layers, relative to the largest), before bits were chosen.
"""


def write_card(projection: Projection, digest: str, folder: Path) -> None:
    """Write README.md, and spectrum.png where spectra are known and matplotlib is installed."""
    plotted = write_plot(projection, folder / "spectrum.png")
    (folder / "README.md").write_text(card(projection, digest, plotted), encoding="utf-8")


def card(projection: Projection, digest: str, plotted: bool) -> str:
    """The model card with its YAML front matter."""
    data = report(projection) | {"digest": digest}
    base = projection.calibration.get("model")
    front = {
        "library_name": "vllm-kqsvd",
        **({"base_model": base} if isinstance(base, str) else {}),
        "base_model_relation": "quantized",
        "tags": ["kv-cache", "kqsvd", "vllm"],
    }
    yaml = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    total = data["total"]
    body = _TEXT.format(
        title=base if isinstance(base, str) else projection.model.architecture,
        latent=total["bytes_per_token"],
        plain=total["bytes_per_token_bf16"],
        bits=total["bits_per_element"],
        ratio=total["compression_ratio"],
        context=total["context"],
        window=total["window"],
        digest=digest,
        calibration=_calibration_table(projection.calibration),
        table=as_text(data),
        plot=_PLOT if plotted else "",
    )
    return f"---\n{yaml}\n---\n\n{body}"


def _calibration_table(calibration: dict[str, Any]) -> str:
    """A Markdown table of what was recorded; nested values as JSON."""
    if not calibration:
        return "Nothing was recorded."
    rows = []
    for key, value in sorted(calibration.items()):
        shown = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        rows.append(f"| {key} | {shown.replace('|', chr(92) + '|').replace(chr(10), ' ')} |")
    return "\n".join(["| | |", "| --- | --- |", *rows])


def write_plot(projection: Projection, file: Path) -> bool:
    """Mean spectrum of keys and values; False (and no file) without spectra or without matplotlib."""
    entries = [(e.codec.head_dim, e.spectrum) for e in projection.layers.values() if e.spectrum]
    if not entries:
        return False
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(6.4, 3.6), dpi=100, layout="constrained")
    axes = FigureCanvasAgg(figure).figure.subplots()
    widest = max(dim for dim, _ in entries)
    for side, label in (("k", "keys"), ("v", "values")):
        curves = [(dim, _relative(spectrum[side])) for dim, spectrum in entries]
        for dim, curve in curves:
            axes.semilogy(range(1, dim + 1), curve, color=_COLOR[side], alpha=0.15, linewidth=0.7)
        same = [curve for dim, curve in curves if dim == widest]
        mean = [sum(column) / len(same) for column in zip(*same, strict=True)]
        axes.semilogy(range(1, widest + 1), mean, color=_COLOR[side], label=label)
    axes.set(xlabel="latent channel", ylabel="relative variance", title=projection.model.architecture)
    axes.legend()
    figure.savefig(file, metadata={"Software": None})
    return True


_COLOR = {"k": "tab:blue", "v": "tab:orange"}


def _relative(spectrum: Any) -> list[float]:
    """Mean over heads of [H, d], over its largest entry; at least 1e-12 so that it can be drawn."""
    mean = spectrum.double().mean(0)
    return (mean / mean.max().clamp(min=1e-300)).clamp(min=1e-12).tolist()
