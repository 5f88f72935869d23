# SPDX-License-Identifier: Apache-2.0
"""The passes over the calibration text: a short pilot for the sinks, moments of every window, gradients of some.

On a CPU several windows run at once (parallel.py); they are added up in their order.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from vllm_kqsvd.calibration.capture import AttentionCall, PassDone, observe, observe_gradients
from vllm_kqsvd.calibration.corpus import Corpus
from vllm_kqsvd.calibration.gradients import attention_gradients
from vllm_kqsvd.calibration.model_probe import LayerInfo
from vllm_kqsvd.calibration.parallel import in_order
from vllm_kqsvd.calibration.sinks import Prototypes, find_prototypes
from vllm_kqsvd.calibration.statistics import LayerStatistics, Statistics
from vllm_kqsvd.ops.rope_block import RopeSpec

PILOT_TEXTS, PILOT_LENGTH = 16, 128
_SAVE_SECONDS = 30.0
_LOGIT_ROWS = 128  # positions whose logits exist at once


@dataclass(frozen=True)
class CollectOptions:
    """What to collect. `num_windows` of `window_length` are the text of the moments; windows with gradients enter the
    moments too and count towards that text. `backward`: gradients of the model's loss; otherwise of random directions
    of each layer's own output, which need no backward pass through the model. `window`: exact recent tokens left out of
    the gradients. `chat`: one window in eight goes through the tokenizer's chat template, if it has one."""

    num_windows: int = 64
    window_length: int = 2048
    gradient_windows: int = 4
    gradient_length: int = 1024
    samples: int = 4096
    window: int = 64
    backward: bool = True
    chat: bool = True
    seed: int = 0

    @property
    def moment_windows(self) -> int:
        """Windows without gradients: what the windows with gradients leave of the text."""
        return max(1, self.num_windows - self.gradient_windows * self.gradient_length // self.window_length)

    @property
    def num_steps(self) -> int:
        """All windows: those for moments alone, then those for moments and gradients."""
        return self.moment_windows + self.gradient_windows


@lru_cache(maxsize=16)
def _turns(rope: RopeSpec, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) of positions 0 .. length - 1, [length, rotary_dim / 2] float32."""
    angle = torch.arange(length, dtype=torch.float64)[:, None] * rope.inv_freq.to("cpu", torch.float64)
    return angle.cos().to(device, torch.float32), angle.sin().to(device, torch.float32)


def before_rope(x: torch.Tensor, rope: RopeSpec) -> torch.Tensor:
    """R_{-p} x for x [heads, T, d] at positions 0 .. T-1: a new contiguous float32 tensor, written in one go."""
    half = rope.inv_freq.numel()
    x = x.float()
    out = torch.empty(x.shape, device=x.device)
    out[..., 2 * half :] = x[..., 2 * half :]
    if half == 0:
        return out
    cos, sin = _turns(rope, x.shape[1], x.device)
    planes = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if rope.interleaved else (slice(half), slice(half, 2 * half))
    )
    (re, im), (re_out, im_out) = ([t[..., p] for p in planes] for t in (x, out))
    torch.mul(re, cos, out=re_out).addcmul_(im, sin)
    torch.mul(im, cos, out=im_out).addcmul_(re, sin, value=-1)
    return out


def draw_labels(p: torch.Tensor, gen: torch.Generator) -> torch.Tensor:
    """One label per row of probabilities [n, vocabulary] by inverting the distribution function (one random number a
    row; torch.multinomial draws one per entry, which costs as much as the layers' backward pass)."""
    cumulative = p.cumsum(-1)
    at = torch.rand(len(p), 1, generator=gen, device=p.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, at)[:, 0].clamp_max(p.shape[-1] - 1)


@torch.no_grad()
def output_gradient(hidden: torch.Tensor, head: nn.Linear, gen: torch.Generator) -> torch.Tensor:
    """Gradient by hidden [n, m] of the summed -log p(label), labels drawn from the model: (p - label) W, some rows at a
    time, since all logits of a window take more memory than the rest of the pass."""
    out = torch.empty_like(hidden)
    for start in range(0, len(hidden), _LOGIT_ROWS):
        rows = slice(start, start + _LOGIT_ROWS)
        p = head(hidden[rows]).float().softmax(-1)
        labels = draw_labels(p, gen)
        p.scatter_add_(1, labels[:, None], torch.full_like(labels[:, None], -1, dtype=p.dtype))
        out[rows] = p.to(hidden.dtype) @ head.weight
    return out


class Collector:
    """Feeds windows of text through a model and adds up statistics; one step is one window."""

    def __init__(
        self, model: PreTrainedModel, layers: list[LayerInfo], corpus: Corpus, options: CollectOptions
    ) -> None:
        self.model, self.layers, self.corpus, self.options = model, layers, corpus, options
        self.device = next(model.parameters()).device
        self._layer_of = {id(layer.module): layer for layer in layers}

    @property
    def num_steps(self) -> int:
        """Windows for moments alone, then windows for moments and gradients."""
        return self.options.num_steps

    def start(self, options: dict[str, object]) -> Statistics:
        """Empty statistics with the sink prototypes of a short pilot pass."""
        length = min(PILOT_LENGTH, self.options.window_length)

        def keys_and_values(index: int) -> list[dict[str, torch.Tensor]]:
            seen: list[dict[str, torch.Tensor]] = []
            self._forward(self.corpus.window(index)[:length], self._recorder(seen))
            return seen

        texts = list(in_order(keys_and_values, range(min(PILOT_TEXTS, max(4, self.options.num_windows))), self.device))
        out = []
        for n, layer in enumerate(self.layers):
            proto: dict[str, Prototypes] = {
                side: find_prototypes(torch.stack([t[n][side] for t in texts]).double()) for side in ("k", "v")
            }
            out.append(LayerStatistics(layer.num_kv_heads, layer.head_dim, proto, self.device))
        return Statistics(out, options)

    def run(self, statistics: Statistics, steps: Iterable[int], save_to: Path | None = None) -> Statistics:
        """Add the windows `steps`; saves now and then to `save_to`, so that a killed run can go on."""
        saved = time.monotonic()
        todo = list(steps)
        done = in_order(lambda step: self._step(statistics.blank(), step), todo, self.device)
        total = statistics.steps_done + len(todo)
        for part in tqdm(done, desc="calibrating", unit="window", initial=statistics.steps_done, total=total):
            statistics.merge(part)
            if save_to and time.monotonic() - saved > _SAVE_SECONDS:
                statistics.save(save_to)
                saved = time.monotonic()
        return statistics

    def _step(self, statistics: Statistics, step: int) -> Statistics:
        (self._moments if step < self.options.moment_windows else self._gradients)(statistics, step)
        statistics.steps_done = 1
        return statistics

    def _forward(self, ids: list[int], observer: Callable[[AttentionCall], None]) -> None:
        """Show every layer's attention call to `observer`; what comes after the last of them is not computed."""

        def until_last(call: AttentionCall) -> None:
            observer(call)
            if call.module is self.layers[-1].module:
                raise PassDone

        with torch.no_grad(), contextlib.suppress(PassDone), observe(until_last):
            self.model.base_model(input_ids=torch.tensor([ids], device=self.device), use_cache=False)

    def _recorder(self, seen: list[dict[str, torch.Tensor]]) -> Callable[[AttentionCall], None]:
        return lambda call: seen.append(self._raw(call))

    def _raw(self, call: AttentionCall) -> dict[str, torch.Tensor]:
        """Key before RoPE and value as [T, H, d]."""
        layer = self._layer_of[id(call.module)]
        k = before_rope(call.k, layer.rope)
        return {"k": k.transpose(0, 1), "v": call.v.float().transpose(0, 1)}

    def _adder(self, statistics: Statistics, step: int, length: int) -> Callable[[AttentionCall], None]:
        """An observer that adds the moments of a window of `length` tokens."""
        gen = torch.Generator().manual_seed(self.options.seed * 1_000_003 + step)
        count = min(length, -(-self.options.samples // self.num_steps))
        sample = torch.randperm(length, generator=gen)[:count].to(self.device)

        def observer(call: AttentionCall) -> None:
            layer = self._layer_of[id(call.module)]
            sums = statistics.layers[layer.index]
            sums.add_tokens("k", before_rope(call.k, layer.rope), sample)
            sums.add_tokens("v", call.v.float(), sample)
            sums.add_queries(before_rope(call.q, layer.rope))

        return observer

    def _moments(self, statistics: Statistics, step: int) -> None:
        self._forward(self.corpus.window(step), self._adder(statistics, step, self.options.window_length))

    def _gradients(self, statistics: Statistics, step: int) -> None:
        ids = self.corpus.window(step)[: self.options.gradient_length]
        gen = torch.Generator(device=self.device).manual_seed(self.options.seed * 1_000_003 + step)
        add = self._adder(statistics, step, len(ids))
        if self.options.backward:
            self._backward(statistics, ids, gen, add)
        else:
            self._local(statistics, ids, gen, add)

    def _backward(
        self, statistics: Statistics, ids: list[int], gen: torch.Generator, add: Callable[[AttentionCall], None]
    ) -> None:
        """Gradients of -log p(labels) with labels drawn from the model itself: their Gram is the Fisher metric."""
        weights: dict[int, dict[str, torch.Tensor]] = {}

        @torch.no_grad()
        def forward(call: AttentionCall) -> None:
            add(call)
            weights[id(call.module)] = self._weights(statistics, call)

        def backward(module: nn.Module, dk: torch.Tensor, dv: torch.Tensor) -> None:
            self._add_gradients(statistics, module, dk, dv, weights[id(module)])

        tokens = torch.tensor([ids], device=self.device)
        embedded = self.model.get_input_embeddings()(tokens).detach().requires_grad_()
        head = self._plain_head
        with observe_gradients(forward, backward, self.options.window):
            if head is not None:
                hidden = self.model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state[0]
                hidden.backward(output_gradient(hidden.detach(), head, gen))
                return
            logits = self.model(inputs_embeds=embedded, use_cache=False).logits[0].float()
            with torch.no_grad():
                labels = draw_labels(logits.softmax(-1), gen)
            nn.functional.cross_entropy(logits, labels, reduction="sum").backward()

    @cached_property
    def _plain_head(self) -> nn.Linear | None:
        """The output projection if the model's logits are just its product with the last hidden state (no soft cap, no
        scale; tried out on a few tokens): then they need not exist all at once."""
        head = self.model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or self.model.base_model is self.model:
            return None
        ids = torch.arange(1, 9, device=self.device)[None]
        with torch.no_grad():
            hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            logits = self.model(input_ids=ids, use_cache=False).logits
            return head if torch.allclose(head(hidden), logits, rtol=1e-2, atol=1e-2) else None

    def _local(
        self, statistics: Statistics, ids: list[int], gen: torch.Generator, add: Callable[[AttentionCall], None]
    ) -> None:
        """Gradients of random directions of each layer's output: their Gram measures the layer's output error."""

        def observer(call: AttentionCall) -> None:
            add(call)
            layer = self._layer_of[id(call.module)]
            weight = layer.output_weight()
            shape = (call.q.shape[0], call.q.shape[1], layer.head_dim)
            if weight is None:
                grad = torch.randn(shape, generator=gen, device=self.device)
            else:
                noise = torch.randn(call.q.shape[1], weight.shape[-1], generator=gen, device=self.device)
                grad = torch.einsum("tm,hdm->htd", noise, weight.to(self.device, torch.float32))
            q, k, v = (x.float() for x in (call.q, call.k, call.v))
            *_, dk, dv = attention_gradients(q, k, v, grad, call.mask, call.scale, call.soft_cap, self.options.window)
            self._add_gradients(statistics, call.module, dk, dv, self._weights(statistics, call))

        self._forward(ids, observer)

    def _weights(self, statistics: Statistics, call: AttentionCall) -> dict[str, torch.Tensor]:
        layer = self._layer_of[id(call.module)]
        sums = statistics.layers[layer.index]
        # Tokens of the last window are never read through the cache inside this text: their gradients are zero.
        readable = torch.arange(call.k.shape[1], device=self.device) < call.k.shape[1] - self.options.window
        k, v = before_rope(call.k, layer.rope), call.v.float()
        return {"k": sums.error_weight("k", k) * readable, "v": sums.error_weight("v", v) * readable}

    def _add_gradients(
        self, stats: Statistics, module: nn.Module, dk: torch.Tensor, dv: torch.Tensor, weights: dict[str, torch.Tensor]
    ) -> None:
        layer = self._layer_of[id(module)]
        stats.layers[layer.index].add_gradients("k", before_rope(dk, layer.rope), weights["k"])
        stats.layers[layer.index].add_gradients("v", dv, weights["v"])
