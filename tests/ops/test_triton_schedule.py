# SPDX-License-Identifier: Apache-2.0
"""The prefill schedule covers every query row and every cached position once, within its memory bounds."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kqsvd.ops.triton.schedule import EXPAND_TILE, FIRST, LAST, chunks, rounds

requests = st.lists(st.tuples(st.integers(0, 70), st.integers(0, 300)), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(
    requests,
    st.integers(0, 2),
    st.sampled_from([0, 16, 64]),
    st.sampled_from([0, 1, 40, 200]),
    st.integers(1, 90),
    st.integers(1, 7),
    st.sampled_from([1, 5, 16]),
)
def test_schedule_covers_everything_once(sizes, decodes, window, sliding, max_rows, slots, tile_rows):
    rows = [q for q, _ in sizes]
    lengths = [q + context for q, context in sizes]
    seen: dict[tuple[int, int], list[int]] = {}
    state_of: dict[tuple[int, int], int] = {}
    for group in chunks(rows, lengths, decodes, window, sliding, max_rows):
        assert sum(c.stop - c.start for c in group) <= max_rows
        for turn in rounds(group, tile_rows, slots * EXPAND_TILE):
            assert len(turn.expand) <= slots
            for request, row, stop, at, end, slot, flags, state in turn.tiles:
                assert 0 < stop - row <= tile_rows and state + stop - row <= max_rows
                assert bool(flags & FIRST) == ((request, row) not in seen)
                if not flags & FIRST:
                    assert state_of[request, row] == state
                state_of[request, row] = state
                seen.setdefault((request, row), []).extend(range(at, end))
                for p in range(at, end, EXPAND_TILE):  # the piece is expanded where the tile looks for it
                    assert turn.expand[(slot + p - at) // EXPAND_TILE] == [request, p, end]
                if flags & LAST:
                    first = lengths[request] - rows[request]
                    limit = max(first + 1 - window, 0) // 16 * 16 if window else first + stop
                    low = max(first + row + 1 - sliding, 0) if sliding else 0
                    got = seen[request, row]
                    assert got == sorted(set(got))
                    assert set(range(low, limit)) <= set(got)
                    for r in range(row, stop):
                        assert (request, -1 - r) not in seen
                        seen[request, -1 - r] = []
    for request, q_len in enumerate(rows):
        done = sorted(-1 - r for i, r in seen if i == request and r < 0)
        assert done == (list(range(q_len)) if request >= decodes else [])
