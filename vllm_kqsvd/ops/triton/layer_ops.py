# SPDX-License-Identifier: Apache-2.0
"""`TritonOps`: launches the Triton kernels of one layer. Decode never looks at device data on the host."""

from __future__ import annotations

import weakref
from typing import Any

import torch
import triton

from vllm_kqsvd.codec import LayerCodec
from vllm_kqsvd.errors import KernelError
from vllm_kqsvd.ops.interface import LayerOps, LayerShape, Step
from vllm_kqsvd.ops.triton import decode, dequantize, merge, prefill, schedule, store
from vllm_kqsvd.ops.triton.buffers import scratch
from vllm_kqsvd.ops.triton.fragment_tables import KEY_HEADROOM, fragment_tables
from vllm_kqsvd.ops.triton.tables import next_power_of_two, rope_tables, side_tables

MAX_SPLITS = 32  # splits of one request; the merge reads them serially
DECODE_WARPS = 4  # of the split kernel; each works alone until the last step
DECODE_REGISTERS = 168  # of its threads: three programs per multiprocessor, not two, for 3 % of spilled instructions
FEW_SUMS = 1536  # value columns times query columns of a warp up to which that is so
WORKSPACE_SLOTS = 8192  # tokens of context expanded at a time in prefill
STATE_ROWS = 2048  # new tokens whose running softmax is kept between rounds of prefill
PREFILL_ROWS = 64  # (token, head of the group) rows per program
STORE_TILE = 16
EXPECTED_DECODES = 256  # requests whose splits have scratch from the start


class TritonOps(LayerOps):
    """Store, decode and prefill on any GPU that Triton compiles for."""

    name = "triton"
    graph_safe = True
    max_decode_len = 8
    needs_host_lengths = True

    def __init__(self, codec: LayerCodec, shape: LayerShape) -> None:
        super().__init__(codec, shape)
        dim, t = shape.head_dim, codec.rope_block
        if dim % 16:
            raise KernelError(f"head_dim {dim} asked for; the Triton kernels need a multiple of 16: use 'reference'")
        if shape.block_size % 16 or shape.num_heads % shape.num_kv_heads:
            raise KernelError(
                f"blocks of {shape.block_size} tokens, {shape.num_heads} heads over {shape.num_kv_heads} KV heads "
                "asked for; the Triton kernels need blocks of a multiple of 16 and whole query groups"
            )
        self.device = device = codec.k.encode.device
        self._k, self._v = k, v = side_tables(codec, "k"), side_tables(codec, "v")
        self._rope = rope_tables(codec.rope, t, device)
        rotary, interleaved = codec.rope.rotary_dim, codec.rope.interleaved
        self._group = shape.num_heads // shape.num_kv_heads
        self._pad = k.decode.shape[-1]
        self._fragments = fragment_tables(k, v, rotary, interleaved)
        self._turns = rope_tables(codec.rope, t, device, self._pad // 2)
        self._rope_block, self._warps = t, DECODE_WARPS
        on_gpu = device.type == "cuda"
        self._programs = 8 * torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 4

        self._frame = {"ROPE_BLOCK": t, "OFFSETS": k.basis.shape[0]}
        self._frame |= {"HALF_ROT": codec.rope.rotary_dim // 2, "INTERLEAVED": codec.rope.interleaved}
        self._head = {"DIM": dim, "PAD": self._pad}
        self._page = {"BLOCK_SIZE": shape.block_size, "TILE_BYTES": codec.layout.tile_bytes}
        self._codes = {"K_PLANES": k.planes, "V_PLANES": v.planes, "K_COLUMNS": k.columns, "V_COLUMNS": v.columns}
        self._codes |= {"K_SCALE": k.scale_offset, "V_SCALE": v.scale_offset}
        self._score = {"SCALE": float(shape.scale), "CAP": float(shape.soft_cap), "SLIDING": shape.sliding_window}
        self._score |= {"GROUP": self._group}

        # Wide heads: more threads for the registers, no prefetched tiles for the shared memory of small GPUs.
        self._launch = {"num_warps": 4, "num_stages": 2} if self._pad <= 128 else {"num_warps": 8, "num_stages": 1}

        # Prefill's memory is taken now, so that an engine that measures free memory later counts it.
        self._workspace()
        self._state()
        self._partials(EXPECTED_DECODES, 1)

    # Memory ---------------------------------------------------------------------------------------------------

    def _workspace(self) -> torch.Tensor:
        s = self.shape
        slots = WORKSPACE_SLOTS * s.num_kv_heads * 2 * s.head_dim
        return scratch("workspace", slots, torch.float16, self.device).view(s.num_kv_heads, -1, 2 * s.head_dim)

    def _state(self) -> torch.Tensor:
        rows = STATE_ROWS * self.shape.num_heads * (self._pad + 2)
        return scratch("state", rows, torch.float32, self.device).view(self.shape.num_kv_heads, -1)

    def _tiling(self, max_decode_len: int) -> dict[str, int]:
        """Shapes of the split kernel for decodes of at most `max_decode_len` query tokens (decode.py)."""
        t, need = self._rope_block, next_power_of_two(self._group * max_decode_len)
        span = max(t, 16) if t else 32
        blocks = span // t if t else 1  # rope blocks in a span
        cols = max(1, min(need, (16 if self._pad <= 128 else 8) // blocks))
        columns = max(8, cols * blocks)
        spans = columns // (cols * blocks)
        return {
            "COLS": cols,
            "COL_TILES": need // cols,
            "SPAN": span,
            "SUB": blocks,
            "R": columns,
            "SUPER": span * spans * (16 // columns if t else 1),
            "TILES": max(1, min(span // 16, 4 // spans)),
        }

    def _partials(self, requests: int, max_decode_len: int) -> tuple[torch.Tensor, torch.Tensor, int, dict[str, int]]:
        """(partial sums, statistics, splits, tiling). Splits depend on the batch alone, never on lengths."""
        tiling = self._tiling(max_decode_len)
        programs = requests * self.shape.num_kv_heads * tiling["COL_TILES"]
        splits = max(1, min(MAX_SPLITS, -(-self._programs // programs)))
        rows = programs * splits * tiling["COLS"]
        partial = scratch("partial", rows * self._v.columns, torch.float32, self.device)
        return partial, scratch("statistics", rows * 3, torch.float32, self.device), splits, tiling

    # Operations -----------------------------------------------------------------------------------------------

    def store(self, key, value, pages, window_pages, slot_mapping, window_slot_mapping, positions) -> None:
        """See LayerOps.store."""
        n = min(slot_mapping.numel(), positions.numel(), key.shape[0])
        if n == 0:
            return
        key, value = _rows(key), _rows(value)
        k, v, heads = self._k, self._v, self.shape.num_kv_heads
        tiles = triton.cdiv(n, STORE_TILE)
        store.store_kernel[(tiles, heads, 2)](
            key,
            value,
            pages,
            slot_mapping,
            positions,
            self._rope,
            *(k.encode, k.encode_unit, k.weight, k.guard, k.shift, k.half_range, k.means, k.basis),
            *(v.encode, v.encode_unit, v.weight, v.guard, v.shift, v.half_range, v.means, v.basis),
            n,
            key.stride(0),
            value.stride(0),
            pages.stride(0),
            **self._head,
            **self._page,
            **self._codes,
            **self._frame,
            TILE=STORE_TILE,
        )
        if window_pages is not None and window_slot_mapping is not None:
            store.store_exact_kernel[(tiles, heads)](
                key,
                value,
                window_pages,
                window_slot_mapping,
                min(n, window_slot_mapping.numel()),
                key.stride(0),
                value.stride(0),
                *window_pages.stride()[:3],
                **self._head,
                WINDOW_BLOCK_SIZE=window_pages.shape[2],
                TILE=STORE_TILE,
            )

    def attend(self, query, key, value, pages, window_pages, step: Step, output) -> None:
        """See LayerOps.attend."""
        query, key, value = (_rows(x) for x in (query, key, value))
        if not _has_dense_rows(output):
            raise KernelError(f"an output with strides {output.stride()} asked for; its heads must lie side by side")
        if window_pages is None or step.window_block_table is None:
            # No exact window: any tensor stands in for the arguments, and WINDOW = 0 keeps them unread.
            window_pages, table, strides = query, step.block_table, (0, 0, 0)
            window_size, length = 16, 0
        else:
            table, strides = step.window_block_table, window_pages.stride()[:3]
            window_size, length = window_pages.shape[2], self.shape.window
        exact = (key, value, window_pages, table, strides, window_size, length)
        if step.num_decodes:
            self._decode(query, pages, exact, step, output)
        if step.num_reqs > step.num_decodes:
            self._prefill(query, pages, exact, step, output)

    def _decode(self, query, pages, exact, step: Step, output) -> None:
        key, value, window_pages, table, strides, window_size, window = exact
        partial, statistics, splits, tiling = self._partials(step.num_decodes, max(step.max_decode_len, 1))
        k, v, f = self._k, self._v, self._fragments
        cuda, sums = torch.version.hip is None, v.columns * tiling["R"]
        grid = (step.num_decodes, self.shape.num_kv_heads * tiling["COL_TILES"])
        decode.split_kernel[(*grid, splits)](
            query,
            pages,
            step.block_table,
            step.query_start_loc,
            step.seq_lens,
            self._turns,
            f.k_decode,
            k.unit,
            f.k_means,
            f.k_basis,
            f.v_middle,
            partial,
            statistics,
            query.stride(0),
            step.block_table.stride(0),
            pages.stride(0),
            splits,
            **self._score,
            **self._head,
            **self._page,
            **self._codes,
            **self._frame,
            **tiling,
            W=self._warps,
            HEADROOM=KEY_HEADROOM,
            SUBNORMAL=cuda,  # not every AMD matrix core keeps subnormal operands
            WINDOW=window,
            num_warps=self._warps,
            num_stages=1,
            **({"maxnreg": DECODE_REGISTERS} if cuda and sums <= FEW_SUMS else {}),
        )
        rows = max(16, tiling["COLS"])
        merge.merge_kernel[grid](
            query,
            key,
            value,
            window_pages,
            table,
            step.query_start_loc,
            step.seq_lens,
            f.v_decode,
            v.unit,
            v.centers,
            partial,
            statistics,
            output,
            query.stride(0),
            key.stride(0),
            value.stride(0),
            table.stride(0),
            *strides,
            output.stride(0),
            splits,
            **self._score,
            **self._head,
            WINDOW=window,
            WINDOW_BLOCK_SIZE=window_size,
            V_PLANES=v.planes,
            V_COLUMNS=v.columns,
            SUPER=tiling["SUPER"],
            W=self._warps,
            COLS=tiling["COLS"],
            COL_TILES=tiling["COL_TILES"],
            ROWS=rows,
            WINDOW_TILE=32,
            **self._launch,
        )

    def _prefill(self, query, pages, exact, step: Step, output) -> None:
        key, value, window_pages, table, strides, window_size, window = exact
        k, v, heads = self._k, self._v, self.shape.num_kv_heads
        workspace, state = self._workspace(), self._state()
        tile_rows = PREFILL_ROWS // self._group
        for expand, num_expand, tiles, num_tiles in _prefill_work(
            step, self.device, window, self.shape.sliding_window, tile_rows
        ):
            if num_expand:
                dequantize.dequantize_kernel[(num_expand, heads)](
                    pages,
                    step.block_table,
                    expand,
                    workspace,
                    self._rope,
                    *(k.decode, k.unit, k.means, k.basis),
                    *(v.decode, v.unit, v.centers),
                    step.block_table.stride(0),
                    pages.stride(0),
                    workspace.stride(0),
                    **self._head,
                    **self._page,
                    **self._codes,
                    **self._frame,
                    TILE=schedule.EXPAND_TILE,
                    num_warps=8,
                )
            prefill.prefill_kernel[(num_tiles, heads)](
                query,
                key,
                value,
                workspace,
                window_pages,
                table,
                step.query_start_loc,
                step.seq_lens,
                tiles,
                state,
                output,
                query.stride(0),
                key.stride(0),
                value.stride(0),
                workspace.stride(0),
                table.stride(0),
                *strides,
                state.stride(0),
                output.stride(0),
                **self._score,
                **self._head,
                WINDOW=window,
                WINDOW_BLOCK_SIZE=window_size,
                ROWS=PREFILL_ROWS,
                TILE=64 if self._pad <= 128 else 32,
                **self._launch,
            )


def _has_dense_rows(x: torch.Tensor) -> bool:
    return x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2])


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x [N, heads, d] whose heads lie side by side (any token stride), copied only if they do not."""
    return x if _has_dense_rows(x) else x.contiguous()


# Work of the latest step: every layer of a step asks for the same lists, so they are built and sent once.
_latest: tuple[Any, dict[tuple[Any, ...], list[tuple[torch.Tensor, int, torch.Tensor, int]]]] = (lambda: None, {})


def _prefill_work(
    step: Step, device: torch.device, window: int, sliding: int, tile_rows: int
) -> list[tuple[torch.Tensor, int, torch.Tensor, int]]:
    """(expand list, its length, query tiles, their number) of every round, on the device; no host sync.

    Lengths come from the step's host copies; only a step without `seq_lens_cpu` is waited for.
    """
    global _latest
    if _latest[0]() is not step:
        _latest = (weakref.ref(step), {})
    key = (device, window, sliding, tile_rows)
    if key not in _latest[1]:
        starts = step.query_start_loc_cpu.tolist()
        lengths = (step.seq_lens_cpu if step.seq_lens_cpu is not None else step.seq_lens).tolist()
        rows = [starts[i + 1] - starts[i] for i in range(step.num_reqs)]
        flat: list[int] = []
        spans = []
        for group in schedule.chunks(rows, lengths, step.num_decodes, window, sliding, STATE_ROWS):
            for turn in schedule.rounds(group, tile_rows, WORKSPACE_SLOTS):
                for items in (turn.expand, turn.tiles):
                    spans.append((len(flat), sum(map(len, items)), len(items)))
                    flat += [x for item in items for x in item]
                    flat += [0] * (-len(flat) % 4)  # 16-byte aligned parts
        sent = torch.tensor(flat, dtype=torch.int32, pin_memory=device.type == "cuda").to(device, non_blocking=True)
        parts = [(sent[at : at + size], count) for at, size, count in spans]
        _latest[1][key] = [(*parts[i], *parts[i + 1]) for i in range(0, len(parts), 2)]
    return _latest[1][key]
