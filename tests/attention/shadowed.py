# SPDX-License-Identifier: Apache-2.0
"""Kernels under watch inside a running engine: every store and attend is repeated by the reference on the same inputs.

Two engines with different kernels part after some tokens, because codes near a decision threshold fall on different
sides and a random model amplifies that. Watching one engine call by call tells rounding from a defect.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_kqsvd.ops.eager import ReferenceOps
from vllm_kqsvd.ops.interface import LayerOps, Step


@dataclass
class Watch:
    """What was seen: worst relative error of a query row by kind of request, and stored bytes that differ."""

    attend: dict[str, float] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    stores: int = 0
    code_bytes: int = 0
    differing_bytes: int = 0
    windows_differ: int = 0

    def saw(self, kind: str, errors: torch.Tensor) -> None:
        """Errors [rows] of one call."""
        if errors.numel():
            worst = float(torch.nan_to_num(errors, nan=float("inf")).max())
            self.attend[kind] = max(self.attend.get(kind, 0.0), worst)
            self.rows[kind] = self.rows.get(kind, 0) + errors.numel()

    @property
    def differing(self) -> float:
        """Share of stored bytes that differ from the reference's."""
        return self.differing_bytes / max(self.code_bytes, 1)


class Shadowed(LayerOps):
    """`inner`, with the reference run after it on the same pages. The engine sees only what `inner` did."""

    def __init__(self, inner: LayerOps, watch: Watch) -> None:
        super().__init__(inner.codec, inner.shape)
        self.name, self.inner, self.watch = inner.name, inner, watch
        self.graph_safe, self.max_decode_len = False, inner.max_decode_len
        self.reference = ReferenceOps(inner.codec, inner.shape)

    def plan_step(self, step: Step) -> object:
        """The inner ops' plan."""
        return self.inner.plan_step(step)

    def store(self, key, value, pages, window_pages, slot_mapping, window_slot_mapping, positions) -> None:
        """Both store, one after the other, into the same pages; the bytes that differ are counted.

        Latent and exact pages are views of one pool, so the first store is undone in both.
        """
        rest = (slot_mapping, window_slot_mapping, positions)
        before, exact_before = pages.clone(), window_pages.clone()
        self.reference.store(key, value, pages, window_pages, *rest)
        want, exact = pages.clone(), _rows_at(window_pages, window_slot_mapping)
        pages.copy_(before), window_pages.copy_(exact_before)
        self.inner.store(key, value, pages, window_pages, *rest)
        self.watch.stores += 1
        n = int((slot_mapping[: positions.numel()] >= 0).sum())
        self.watch.code_bytes += n * self.codec.plan.bytes_per_token * self.shape.num_kv_heads
        self.watch.differing_bytes += int((pages != want).sum())
        self.watch.windows_differ += int((_rows_at(window_pages, window_slot_mapping) != exact).sum())

    def attend(self, query, key, value, pages, window_pages, step: Step, output) -> None:
        """Both attend to the inner ops' pages; errors are relative per query row, all heads together."""
        self.inner.attend(query, key, value, pages, window_pages, step, output)
        want = torch.zeros_like(output[: step.num_tokens])
        self.reference.attend(query, key, value, pages, window_pages, step, want)
        got, want = (x[: step.num_tokens].double().flatten(1) for x in (output, want))
        errors = ((got - want).norm(dim=1) / want.norm(dim=1).clamp_min(1e-9)).cpu()
        starts = step.query_start_loc_cpu[: step.num_reqs + 1].tolist()
        lengths = step.seq_lens.tolist()
        for i, (a, b) in enumerate(zip(starts, starts[1:], strict=False)):
            kind = "decode" if b - a == 1 else "verify" if i < step.num_decodes else "prompt"
            self.watch.saw(kind if b - a < lengths[i] else "whole prompt", errors[a:b])


def _rows_at(window_pages: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Exact rows [n, H, 2 d] at the slots that are not skipped."""
    at, size = slots[slots >= 0].long(), window_pages.shape[2]
    return window_pages[at // size, :, at % size]


def watch_engine(llm: Any) -> Watch:
    """Put every compressed layer of an eager, in-process engine under watch."""
    watch = Watch()
    for layer in llm.llm_engine.vllm_config.compilation_config.static_forward_context.values():
        impl = getattr(layer, "impl", None)
        if getattr(impl, "_ops", None) is not None:
            impl._ops = Shadowed(impl._ops, watch)
    return watch
