# SPDX-License-Identifier: Apache-2.0
"""Counts engine steps in which attention returned a value that is not finite: on the device, without a host sync.

Only the last compressed layer is looked at: what is not finite in an earlier layer reaches it through the residual
stream. The count is copied to the host in passing, about once a second, and shown on /metrics; `check_nan` stops at
the layer itself instead.
"""

from __future__ import annotations

import time

import torch
from vllm.logger import init_logger

from vllm_kqsvd import status

logger = init_logger("vllm.kqsvd")

POLL_SECONDS = 1.0


class NanGuard:
    """The counter of one rank. `count` may be captured in a CUDA graph; `poll` runs between steps."""

    def __init__(self, device: torch.device, rank: status.RankStatus) -> None:
        self._rank = rank
        self._count = torch.zeros(1, dtype=torch.int64, device=device)
        self._seen = torch.zeros(1, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._copied: torch.cuda.Event | None = None
        self._next = 0.0

    def count(self, output: torch.Tensor, query_start_loc: torch.Tensor) -> None:
        """Add 1 if a row of `output` [N, ...] is not finite; rows behind query_start_loc[-1] pad a graph."""
        rows = output.flatten(1).sum(1, dtype=torch.float32)
        live = torch.arange(rows.shape[0], device=rows.device) < query_start_loc[-1]
        self._count += (live & ~rows.isfinite()).any()

    def poll(self) -> None:
        """Publish a count that has grown, and start the next copy."""
        if time.monotonic() < self._next or (self._copied is not None and not self._copied.query()):
            return
        self._next = time.monotonic() + POLL_SECONDS
        if self._count.device.type == "cuda":
            trips = int(self._seen) if self._copied is not None else 0
            self._seen.copy_(self._count, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            trips = int(self._count)
        if trips > self._rank.nan_trips:
            self._rank.nan_trips = trips
            status.publish(self._rank)
            logger.warning(
                "kqsvd: attention returned values that are not finite in %d steps so far; "
                "kqsvd.check_nan stops at the layer where it happens",
                trips,
            )
