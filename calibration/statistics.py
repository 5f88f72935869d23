# SPDX-License-Identifier: Apache-2.0
"""Streaming second moments of one calibration run: sums only, so runs merge, and survive interruption exactly.

Everything is before RoPE (frames.py derives every rope mode from it), in float64, per layer and KV head:

| name | shape | content |
| --- | --- | --- |
| `{k,v}_count`, `{k,v}_sum`, `{k,v}_gram` | [H], [H, d], [H, d, d] | ordinary tokens |
| `{k,v}_sink_count`, `{k,v}_sink_sum` | [H], [H, d] | sink tokens |
| `q_count`, `q_gram` | [], [H, d, d] | queries, the heads of a group stacked |
| `{k,v}_grad_count`, `{k,v}_grad_gram` | [H], [H, d, d] | dL/dk, dL/dv at ordinary tokens, weighted and clipped |
| `{k,v}_samples` | [n, H, d] float32 | tokens drawn at random, for the quantizer's tables |
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vllm_kqsvd.calibration.sinks import FIRST_ORDINARY, Prototypes
from vllm_kqsvd.errors import CalibrationError

_METADATA_KEY, _TEXTS = "kqsvd_statistics", "texts"
_CLIP_SHARE = 0.95  # of a window's tokens keep their gradient energy whole; the rest are cut down to this quantile
_BLOCK = 256  # tokens whose products or values are added in float32 before float64 takes over


def gram(x: torch.Tensor) -> torch.Tensor:
    """x^T x of x [H, n, d] float32 -> [H, d, d] float64: float32 products, float64 sums over blocks of tokens.

    For moments about zero whose mean is not subtracted later, or of what is left of keys and values without a mean
    close to theirs: key biases hundreds of times larger than the spread would leave no digits.
    """
    blocks, rest = _blocks(x)
    return (blocks.mT @ blocks).sum(1, dtype=torch.float64) + (rest.mT @ rest).double()


def token_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the tokens of x [H, n, d] float32 -> [H, d] float64, likewise."""
    blocks, rest = _blocks(x)
    return blocks.sum(2).sum(1, dtype=torch.float64) + rest.sum(1).double()


def _blocks(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [H, n, d] as whole blocks of tokens [H, blocks, _BLOCK, d] and the rest."""
    whole = x.shape[1] // _BLOCK * _BLOCK
    return x[:, :whole].reshape(x.shape[0], -1, _BLOCK, x.shape[-1]), x[:, whole:]


class LayerStatistics:
    """Sums of one layer. `prototypes` decide each token's class; `device` holds the sums."""

    def __init__(self, heads: int, dim: int, prototypes: dict[str, Prototypes], device: torch.device | str) -> None:
        f64: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.prototypes = {s: p.to(device) for s, p in prototypes.items()}
        self.sums: dict[str, torch.Tensor] = {
            "q_count": torch.zeros((), **f64),
            "q_gram": torch.zeros(heads, dim, dim, **f64),
        }
        self.samples: dict[str, list[torch.Tensor]] = {"k_samples": [], "v_samples": []}
        for s in ("k", "v"):
            for name in ("count", "sink_count", "grad_count"):
                self.sums[f"{s}_{name}"] = torch.zeros(heads, **f64)
            for name in ("sum", "sink_sum"):
                self.sums[f"{s}_{name}"] = torch.zeros(heads, dim, **f64)
            for name in ("gram", "grad_gram"):
                self.sums[f"{s}_{name}"] = torch.zeros(heads, dim, dim, **f64)

    def classes(self, side: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(ordinary, sink) masks [H, T] of x [H, T, d]; the first positions are ordinary in neither sense."""
        sink = self.prototypes[side].is_sink(x.transpose(0, 1)).T
        ordinary = ~sink
        ordinary[:, :FIRST_ORDINARY] = False
        return ordinary, sink

    def add_tokens(self, side: str, x: torch.Tensor, sample: torch.Tensor) -> None:
        """Keys or values x [H, T, d] float32 of one window; the tokens `sample` [n] are kept as they are."""
        x = x.contiguous()
        ordinary, sink = self.classes(side, x)
        mean = self.prototypes[side].mean
        y = (x - mean[:, None]).mul_(ordinary[..., None])
        count, total, m = ordinary.sum(-1).double(), token_sum(y), mean.double()
        # Back to moments about zero, which merge: sum of (y + m)(y + m)^T.
        cross = (total + count[:, None] * m / 2)[:, :, None] * m[:, None, :]
        self.sums[f"{side}_count"] += count
        self.sums[f"{side}_sum"] += total + count[:, None] * m
        self.sums[f"{side}_gram"] += gram(y) + cross + cross.mT
        self.sums[f"{side}_sink_count"] += sink.sum(-1)
        self.sums[f"{side}_sink_sum"] += token_sum(x * sink[..., None])
        self.samples[f"{side}_samples"].append(x[:, sample].transpose(0, 1).float().cpu())

    def add_queries(self, q: torch.Tensor) -> None:
        """Queries q [Hq, T, d] before RoPE, float32; the heads of a KV head are stacked, not averaged. Overwrites the
        first positions of q."""
        heads, dim = self.sums["q_gram"].shape[:2]
        q[:, :FIRST_ORDINARY] = 0  # in place, for the rest to stay one block of memory
        y = q.reshape(heads, -1, dim)
        self.sums["q_count"] += q.shape[0] // heads * max(0, q.shape[1] - FIRST_ORDINARY)
        self.sums["q_gram"] += gram(y)

    def add_gradients(self, side: str, grad: torch.Tensor, weight: torch.Tensor) -> None:
        """Gradients [H, T, d] of a window's loss before RoPE; weight [H, T]: squared scale of a token's coding error,
        0 for tokens that are left out.

        A token's error is proportional to its own scale, so that its gradient counts by the scale squared. And a
        hundredth of the tokens carries most of the energy, far beyond where the loss is quadratic: energies above a
        quantile of the window are cut down to it.
        """
        counted = weight > 0
        weight = weight * (counted.sum(-1) / weight.sum(-1).clamp_min(1e-30))[:, None]
        energy = grad.float().square().sum(-1) * weight
        for h in range(len(energy)):
            if bool(counted[h].any()):
                limit = energy[h][counted[h]].quantile(_CLIP_SHARE)
                weight[h] *= (limit / energy[h].clamp_min(1e-30)).clamp_max(1)
        self.sums[f"{side}_grad_count"] += counted.sum(-1)
        self.sums[f"{side}_grad_gram"] += gram(grad.float() * weight.sqrt()[..., None])

    def error_weight(self, side: str, x: torch.Tensor) -> torch.Tensor:
        """Weights [H, T] of `add_gradients` for keys before RoPE or values x [H, T, d]."""
        ordinary, _ = self.classes(side, x)
        return (x - self.prototypes[side].mean[:, None]).square().sum(-1) * ordinary

    def mean(self, side: str) -> torch.Tensor:
        """Mean of ordinary tokens before RoPE, [H, d] float64."""
        return self.sums[f"{side}_sum"] / self.sums[f"{side}_count"].clamp_min(1)[:, None]

    def covariance(self, side: str) -> torch.Tensor:
        """Centred covariance of ordinary tokens before RoPE, [H, d, d] float64."""
        return self.second_moment(side) - self.mean(side)[:, :, None] * self.mean(side)[:, None, :]

    def second_moment(self, side: str) -> torch.Tensor:
        """Second moment about zero of ordinary tokens before RoPE, [H, d, d] float64."""
        return self.sums[f"{side}_gram"] / self.sums[f"{side}_count"].clamp_min(1)[:, None, None]

    def sink(self, side: str) -> torch.Tensor:
        """Sink prototype before RoPE [H, d]: the mean of the tokens found to be sinks, else the ordinary mean."""
        count = self.sums[f"{side}_sink_count"][:, None]
        has = (self.prototypes[side].sink != self.prototypes[side].mean).any(-1, keepdim=True) & (count > 0)
        return torch.where(has, self.sums[f"{side}_sink_sum"] / count.clamp_min(1), self.mean(side))

    def query_gram(self) -> torch.Tensor:
        """Second moment of the stacked queries before RoPE, [H, d, d]."""
        return self.sums["q_gram"] / self.sums["q_count"].clamp_min(1)

    def gradient_gram(self, side: str) -> torch.Tensor | None:
        """Fisher metric [H, d, d] per token in the frame before RoPE, or None if no gradients were taken."""
        count = self.sums[f"{side}_grad_count"][:, None, None]
        return None if not bool((count > 0).all()) else self.sums[f"{side}_grad_gram"] / count

    def tokens(self, side: str) -> torch.Tensor:
        """The sampled tokens [n, H, d] float32."""
        return torch.cat(self.samples[f"{side}_samples"])

    def merge(self, other: LayerStatistics) -> None:
        """Add the sums of another run with the same prototypes over other windows."""
        for name, value in other.sums.items():
            self.sums[name] += value.to(self.sums[name].device)
        for name, parts in other.samples.items():
            self.samples[name] += parts


class Statistics:
    """Sums of all layers, and how many steps of the run they hold."""

    def __init__(self, layers: list[LayerStatistics], options: dict[str, object], steps_done: int = 0) -> None:
        self.layers, self.options, self.steps_done = layers, options, steps_done
        self.texts: dict[str, torch.Tensor] = {}  # of layer_costs.budget_texts, once all windows are done

    def blank(self) -> Statistics:
        """Empty statistics with the same prototypes."""
        grams = [(x.prototypes, x.sums["q_gram"]) for x in self.layers]
        return Statistics([LayerStatistics(g.shape[0], g.shape[1], p, g.device) for p, g in grams], self.options)

    def merge(self, other: Statistics) -> None:
        """Add another run's sums (see LayerStatistics.merge)."""
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.merge(theirs)
        self.steps_done += other.steps_done

    def save(self, path: Path) -> None:
        """Write everything to one safetensors file, atomically. Raises CalibrationError if that is impossible."""
        tensors: dict[str, torch.Tensor] = {}
        for i, layer in enumerate(self.layers):
            for name, value in layer.sums.items():
                tensors[f"{i}.{name}"] = value.cpu().contiguous()
            for name, parts in layer.samples.items():
                if parts:
                    tensors[f"{i}.{name}"] = torch.cat(parts).contiguous()
            for side, p in layer.prototypes.items():
                tensors[f"{i}.{side}_proto_mean"], tensors[f"{i}.{side}_proto_sink"] = p.mean.cpu(), p.sink.cpu()
        tensors |= {f"{_TEXTS}.{name}": x for name, x in self.texts.items()}
        header = json.dumps({"options": self.options, "steps_done": self.steps_done}, sort_keys=True)
        temporary = path.with_suffix(".tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, temporary, metadata={_METADATA_KEY: header})
            os.replace(temporary, path)
        except (OSError, SafetensorError) as e:
            temporary.unlink(missing_ok=True)  # on a full disk it would only be in the way
            raise CalibrationError(
                f"cannot save the growing statistics in {path.parent}: {e}; free some space or choose another --output"
            ) from e

    @classmethod
    def load(cls, path: Path, options: dict[str, object] | None, device: torch.device | str) -> Statistics:
        """Read a file of `save`; raises CalibrationError unless it was made with the same options (None: any)."""
        try:
            with safe_open(path, "pt") as f:
                header = json.loads((f.metadata() or {})[_METADATA_KEY])
                tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
            found, steps = header["options"], int(header["steps_done"])
            if options is None or found == json.loads(json.dumps(options)):
                texts = {n: tensors.pop(n) for n in list(tensors) if n.startswith(f"{_TEXTS}.")}
                out = cls(_layers_from(tensors, device), found, steps)
                out.texts = {n.removeprefix(f"{_TEXTS}."): x for n, x in texts.items()}
                return out
        except (OSError, KeyError, ValueError, TypeError, IndexError, SafetensorError) as e:
            raise CalibrationError(
                f"{path} is not a statistics file ({type(e).__name__}: {str(e)[:200]}); delete it or calibrate "
                "without --resume"
            ) from e
        raise CalibrationError(f"{path} was made with other options or data; calibrate without --resume to start over")


def _layers_from(tensors: dict[str, torch.Tensor], device: torch.device | str) -> list[LayerStatistics]:
    """The layers of a file of `Statistics.save`. Raises KeyError or ValueError where it is not one."""
    layers = []
    for i in range(1 + max(int(n.split(".")[0]) for n in tensors)):
        mine = {n.split(".")[1]: t for n, t in tensors.items() if n.startswith(f"{i}.")}
        proto = {s: Prototypes(mine.pop(f"{s}_proto_mean"), mine.pop(f"{s}_proto_sink")) for s in ("k", "v")}
        heads, dim = mine["q_gram"].shape[:2]
        layer = LayerStatistics(heads, dim, proto, device)
        layer.samples = {n: [mine.pop(n)] if n in mine else [] for n in layer.samples}
        if {n: t.shape for n, t in mine.items()} != {n: t.shape for n, t in layer.sums.items()}:
            raise ValueError(f"layer {i} has other sums than this version collects")
        layer.sums = {n: t.to(device) for n, t in mine.items()}
        layers.append(layer)
    return layers
