# SPDX-License-Identifier: Apache-2.0
"""Host schedule of prefill: which context is expanded when, and which query tiles read it. Pure Python.

Queries are taken `max_rows` at a time and their latent context `max_slots` tokens at a time, so that the
workspace and the running softmax state are bounded whatever the context. Short contexts of many requests
share a round; a request's context is at most one piece per round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

EXPAND_TILE = 32  # tokens per program of the dequantize kernel; pieces start at multiples of it in the workspace
FIRST, LAST = 1, 2  # flags of a query tile: start a fresh state; attend to the exact tokens and write the output


@dataclass
class Round:
    """One expansion and one attention launch.

    expand: [request, first position, end] per workspace tile. tiles: [request, first row in the request,
    end row, piece start, piece end, workspace slot of the piece, flags, state row] per query tile.
    """

    expand: list[list[int]] = field(default_factory=list)
    tiles: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class Chunk:
    """Rows [start, stop) of a request (counted in this step) whose latent context is positions [low, high)."""

    request: int
    start: int
    stop: int
    low: int
    high: int


def chunks(
    rows: Sequence[int], seq_lens: Sequence[int], first_request: int, window: int, sliding: int, max_rows: int
) -> Iterator[list[Chunk]]:
    """Groups of chunks with at most `max_rows` rows in all. `window` 0: everything is read from latent pages."""
    group: list[Chunk] = []
    free = max_rows
    for request in range(first_request, len(rows)):
        q_len, length, at = rows[request], seq_lens[request], 0
        first = length - q_len  # position of the first query of the step
        end = max(first + 1 - window, 0) // 16 * 16 if window else length
        while at < q_len:
            take = min(q_len - at, free)
            low = min(max(first + at + 1 - sliding, 0) // 16 * 16, end) if sliding else 0
            high = end if window else min(end, first + at + take)
            group.append(Chunk(request, at, at + take, low, max(low, high) if length > 0 else low))
            at, free = at + take, free - take
            if free == 0:
                yield group
                group, free = [], max_rows
    if group:
        yield group


def rounds(group: Sequence[Chunk], tile_rows: int, max_slots: int) -> Iterator[Round]:
    """Rounds that serve a group of chunks: contexts packed into `max_slots` workspace slots at a time."""
    current, used, state = Round(), 0, 0
    for c in group:
        at, pending = c.low, True
        while pending:
            room = (max_slots - used) // EXPAND_TILE * EXPAND_TILE
            if at < c.high and room == 0:
                yield current
                current, used = Round(), 0
                continue
            end = min(c.high, at + room)
            flags = (FIRST if at == c.low else 0) | (LAST if end >= c.high else 0)
            for row in range(c.start, c.stop, tile_rows):
                stop = min(row + tile_rows, c.stop)
                current.tiles.append([c.request, row, stop, at, end, used, flags, state + row - c.start])
            current.expand += [[c.request, p, end] for p in range(at, end, EXPAND_TILE)]
            used += -(-(end - at) // EXPAND_TILE) * EXPAND_TILE
            at, pending = end, end < c.high
        state += c.stop - c.start
    if current.tiles:
        yield current
