# SPDX-License-Identifier: Apache-2.0
"""Division of a step's cached context into segments that fit a bounded workspace. Integers only, once per step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vllm_kqsvd.layout import TILE
from vllm_kqsvd.ops.interface import Step

NEVER = 2**31 - 1


@dataclass(frozen=True)
class Segment:
    """Cached positions of consecutive requests, expanded and attended together by the rows of these requests.

    ranges [5, n + 1] int32 on the device: first position (a multiple of 16), first workspace row, first tile,
    first exact position, row of the block tables; the last column closes the prefix sums.
    """

    query_rows: slice  # of the prefill rows
    ranges: torch.Tensor
    cu_query: torch.Tensor  # [n + 1] int32, from 0
    num_tiles: int
    num_rows: int
    max_query: int
    max_rows: int
    spans: tuple[tuple[int, int, int, int, int], ...]  # per request: query start, query end, p0, first, end

    @property
    def cu_rows(self) -> torch.Tensor:
        """[n + 1] int32: workspace rows of each request."""
        return self.ranges[1]


@dataclass(frozen=True)
class PrefillPlan:
    """The prefill rows of a step: their own causal attention, then `segments` of cached context."""

    first_row: int
    num_rows: int
    cu_query: torch.Tensor  # [P + 1] int32, from 0
    max_query: int
    spans: tuple[tuple[int, int, int], ...]  # per request: query start, query end, p0
    segments: tuple[Segment, ...]


def segment_tables(
    q_lens: np.ndarray, contexts: np.ndarray, first_request: int, window: int, capacity: int
) -> tuple[list[np.ndarray], list[dict[str, object]]]:
    """(int32 arrays [6, n + 1] per segment: the rows of `Segment.ranges` and cu_query; its host fields).

    Contexts are laid end to end in units of whole tiles and cut every `capacity` rows (a multiple of 16).
    """
    padded = -(-contexts // TILE) * TILE
    cum = np.concatenate(([0], np.cumsum(padded)))
    query = np.concatenate(([0], np.cumsum(q_lens)))
    exact = np.maximum(contexts + 1 - window, 0) // TILE * TILE if window else np.full_like(contexts, NEVER)
    tables, fields = [], []
    for low in range(0, int(cum[-1]), capacity):
        high = min(low + capacity, int(cum[-1]))
        a = int(np.searchsorted(cum, low, "right")) - 1
        b = int(np.searchsorted(cum, high, "left"))
        first = np.maximum(0, low - cum[a:b])
        end = np.maximum(first, np.minimum(contexts[a:b], high - cum[a:b]))
        rows = end - first
        table = np.zeros((6, b - a + 1), np.int32)
        table[0, :-1], table[3, :-1], table[4, :-1] = first, exact[a:b], np.arange(a, b) + first_request
        table[1, 1:], table[2, 1:] = np.cumsum(rows), np.cumsum(-(-rows // TILE))
        table[5] = query[a : b + 1] - query[a]
        tables.append(table)
        spans = zip(query[a:b], query[a + 1 : b + 1], contexts[a:b], first, end, strict=True)
        fields.append(
            {
                "query_rows": slice(int(query[a]), int(query[b])),
                "num_tiles": int(table[2, -1]),
                "num_rows": int(table[1, -1]),
                "max_query": int(q_lens[a:b].max()),
                "max_rows": int(rows.max()),
                "spans": tuple(tuple(map(int, s)) for s in spans),
            }
        )
    return tables, fields


def plan_prefill(step: Step, window: int, capacity: int) -> PrefillPlan | None:
    """Plan of the step's prefill rows (None: there are none), sent to the device in one copy without a sync.

    `window`: positions kept exactly (0: none). `capacity`: workspace rows, a multiple of 16.
    """
    first, count = step.num_decodes, step.num_reqs - step.num_decodes
    if count <= 0 or step.num_tokens <= step.num_decode_tokens:
        return None
    starts = step.query_start_loc_cpu[first : step.num_reqs + 1].numpy().astype(np.int64)
    lengths = step.seq_lens if step.seq_lens_cpu is None else step.seq_lens_cpu
    q_lens = np.diff(starts)
    contexts = lengths[first : step.num_reqs].cpu().numpy().astype(np.int64) - q_lens
    tables, fields = segment_tables(q_lens, contexts, first, window, capacity)
    device = step.query_start_loc.device
    flat = np.concatenate([(starts - starts[0]).astype(np.int32), *(t.ravel() for t in tables)])
    host = torch.from_numpy(flat)
    if device.type == "cuda":
        host = host.pin_memory()
    sent = host.to(device, non_blocking=True)
    at, segments = count + 1, []
    for table, field in zip(tables, fields, strict=True):
        part = sent[at : at + table.size].view(6, -1)
        at += table.size
        segments.append(Segment(ranges=part[:5], cu_query=part[5], **field))  # type: ignore[arg-type]
    ends = starts - starts[0]
    spans = zip(ends[:-1], ends[1:], contexts, strict=True)
    return PrefillPlan(
        first_row=int(starts[0]),
        num_rows=int(ends[-1]),
        cu_query=sent[: count + 1],
        max_query=int(q_lens.max()),
        spans=tuple((int(a), int(b), int(p0)) for a, b, p0 in spans),
        segments=tuple(segments),
    )
