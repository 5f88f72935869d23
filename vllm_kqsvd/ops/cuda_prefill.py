# SPDX-License-Identifier: Apache-2.0
"""Prefill attention: the chunk exactly, cached context through a bounded workspace, merged by log-sum-exp."""

from __future__ import annotations

from typing import Protocol

import torch

from vllm_kqsvd.ops.cuda_segments import PrefillPlan, Segment
from vllm_kqsvd.ops.cuda_store import LatentStore
from vllm_kqsvd.ops.interface import LayerShape, Step

WORKSPACE_ROWS = 32768  # context tokens expanded at a time
_MATH_ROWS = 64  # query rows per product of the plain path


class Varlen(Protocol):
    """Attention of many sequences packed row after row, in the calling convention of FlashAttention.

    q [N, Hq, d]; k, v [M, H, d]; cu_* [S + 1] int32 on the device. Returns out [N, Hq, d] (written to `out` if that
    is given and can be) and the natural log-sum-exp [Hq, N] float32, infinite for rows without a key.
    """

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_q: torch.Tensor,
        cu_k: torch.Tensor,
        max_q: int,
        max_k: int,
        scale: float,
        causal: bool,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


def torch_varlen(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal, out=None) -> tuple[torch.Tensor, torch.Tensor]:
    """The FlashAttention 2 that PyTorch itself carries."""
    result = torch.ops.aten._flash_attention_forward(q, k, v, cu_q, cu_k, max_q, max_k, 0.0, causal, False, scale=scale)
    return result[0], result[1]


_workspaces: dict[tuple[object, ...], torch.Tensor] = {}


def workspace(shape: LayerShape, device: torch.device) -> torch.Tensor:
    """[2, rows, H, d] keys and values of one segment, shared by all layers of equal shape."""
    key = (shape.num_kv_heads, shape.head_dim, shape.dtype, str(device))
    if key not in _workspaces:
        size = (2, WORKSPACE_ROWS, shape.num_kv_heads, shape.head_dim)
        _workspaces[key] = torch.empty(size, dtype=shape.dtype, device=device)
    return _workspaces[key]


def workspace_bytes(shape: LayerShape) -> int:
    """Bytes of `workspace`: 128 MiB for 8 KV heads of width 128 in 16 bits."""
    return 2 * WORKSPACE_ROWS * shape.num_kv_heads * shape.head_dim * shape.dtype.itemsize


class Prefill:
    """Attention of the prefill rows of one layer. `varlen` may be replaced by a faster one (vLLM's, flash_attn's)."""

    def __init__(self, store: LatentStore, shape: LayerShape, device: torch.device) -> None:
        self.store, self.shape = store, shape
        self.varlen: Varlen = torch_varlen
        self._rows = workspace(shape, device)
        self.capacity = self._rows.shape[1]  # context tokens expanded at a time

    def _expand(self, segment: Segment, pages, window_pages, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = self._rows
        window_table = step.window_block_table
        if window_pages is None or window_table is None:
            window_pages = window_table = None
        self.store.dequantize(
            pages, step.block_table, window_pages, window_table, segment.ranges, segment.num_tiles, key, value
        )
        return key[: segment.num_rows], value[: segment.num_rows]

    def attend(self, query, key, value, pages, window_pages, step: Step, plan: PrefillPlan, output) -> None:
        """Rows [first_row, first_row + num_rows) of the step. key, value: the step's own rows [N, H, d]."""
        rows = slice(plan.first_row, plan.first_row + plan.num_rows)
        q, k, v, out = query[rows], key[rows], value[rows], output[rows]
        if self.shape.soft_cap or self.shape.sliding_window:
            self._attend_plainly(q, k, v, pages, window_pages, step, plan, out)
            return
        cu, longest, scale = plan.cu_query, plan.max_query, self.shape.scale
        got, lse = self.varlen(q, k, v, cu, cu, longest, longest, scale, True, out)
        if got.data_ptr() != out.data_ptr():
            out.copy_(got)
        for s in plan.segments:
            keys, values = self._expand(s, pages, window_pages, step)
            more = self.varlen(
                q[s.query_rows], keys, values, s.cu_query, s.cu_rows, s.max_query, s.max_rows, scale, False
            )
            torch.ops.kqsvd.merge_attention(out[s.query_rows], lse[:, s.query_rows], *more)

    def _attend_plainly(self, q, k, v, pages, window_pages, step: Step, plan: PrefillPlan, out) -> None:
        """Soft cap and sliding window, which no packed FlashAttention call can express over segments: plain products,
        request by request."""
        s = self.shape
        total = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        lse = torch.full(q.shape[:2], float("-inf"), device=q.device)
        for start, end, p0 in plan.spans:
            part = slice(start, end)
            _accumulate(q[part], k[part], v[part], p0, p0, s, total[part], lse[part])
        for segment in plan.segments:
            keys, values = self._expand(segment, pages, window_pages, step)
            at = 0
            for start, end, p0, first, last in segment.spans:
                part, own = slice(start, end), slice(at, at + last - first)
                at = own.stop
                if last > first:
                    _accumulate(q[part], keys[own], values[own], p0, first, s, total[part], lse[part])
        out.copy_(total)


def _accumulate(q, k, v, p0: int, first: int, shape: LayerShape, total, lse) -> None:
    """Attention of q [n, Hq, d] at p0... over k, v [m, H, d] at first..., merged into total and lse [n, Hq]."""
    heads, dim = shape.num_kv_heads, shape.head_dim
    k, v = k.float().permute(1, 2, 0), v.float().transpose(0, 1)  # [H, d, m], [H, m, d]
    at = torch.arange(first, first + k.shape[-1], device=q.device)
    for i in range(0, q.shape[0], _MATH_ROWS):
        rows = slice(i, i + _MATH_ROWS)
        n = q[rows].shape[0]
        grouped = q[rows].float().view(n, heads, -1, dim).permute(1, 2, 0, 3)  # [H, g, n, d]
        score = torch.matmul(grouped, k[:, None]) * shape.scale
        if shape.soft_cap:
            score = shape.soft_cap * torch.tanh(score / shape.soft_cap)
        here = torch.arange(p0 + i, p0 + i + n, device=q.device)[:, None]
        hidden = at > here
        if shape.sliding_window:
            hidden |= at <= here - shape.sliding_window
        score = score.masked_fill(hidden, float("-inf"))
        more = score.logsumexp(-1)
        weight = torch.nan_to_num(torch.exp(score - more[..., None]), nan=0.0)
        result = torch.matmul(weight, v[:, None]).permute(2, 0, 1, 3).reshape(n, -1, dim)
        more = more.permute(2, 0, 1).reshape(n, -1)
        both = torch.logaddexp(lse[rows], more)
        old, new = (torch.nan_to_num(torch.exp(x - both), nan=0.0)[..., None] for x in (lse[rows], more))
        total[rows] = total[rows] * old + result * new
        lse[rows] = both
