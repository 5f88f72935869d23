# SPDX-License-Identifier: Apache-2.0
"""Start-up check of a layer's kernels: store and attend on random rows, against the reference, real codec."""

from __future__ import annotations

from dataclasses import replace

import torch

from vllm_kqsvd.codec import LayerCodec
from vllm_kqsvd.errors import KernelError
from vllm_kqsvd.ops.eager import ReferenceOps
from vllm_kqsvd.ops.interface import LayerOps, LayerShape, Step

CHUNK = 9  # rows of the second prompt chunk
PEAKEDNESS = 2.0  # standard deviation of the logits
TOLERANCE = {torch.float32: 0.02, torch.float16: 0.1, torch.bfloat16: 0.15}  # relative; faults cause 0.5 and more
MOST = 0.4  # whatever rounding does to a layer


def _rows(
    codec: LayerCodec, tokens: int, shape: LayerShape, device: torch.device, gen: torch.Generator
) -> list[torch.Tensor]:
    """Query, key, value rows as wide as the codec's steps expect; few keys dominate, or faults would average out."""
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    query, key, value = (torch.randn(tokens, n, shape.head_dim, generator=gen) for n in heads)
    for x, side in ((key, codec.k), (value, codec.v)):
        x *= side.decode.norm(dim=(1, 2)).cpu()[:, None] / side.decode.shape[1] ** 0.5
    query *= PEAKEDNESS / (shape.scale * shape.head_dim**0.5 * key.std())
    key += (codec.k.mean_basis[0] @ codec.k.mean).cpu()
    noise = [query, key, value]
    return [x.to(device, shape.dtype) for x in noise]


def _step(tokens: int, total: int, decoded: bool, table: torch.Tensor, window: torch.Tensor) -> Step:
    """One request of `total` positions whose last `tokens` are this step's."""
    device = table.device
    start = torch.tensor([0, tokens], dtype=torch.int32)
    length = torch.tensor([total], dtype=torch.int32)
    decodes = int(decoded)
    return Step(
        tokens, 1, decodes, decodes * tokens, tokens if decoded else 1, total,
        start.to(device), start, length.to(device), length,
        table, window, torch.arange(total - tokens, total, device=device),
    )  # fmt: skip


def _run(ops: LayerOps, rows: list[torch.Tensor], prompt: int, drafts: int, device: torch.device) -> torch.Tensor:
    """Last rows of a second prompt chunk, of one decoded token and, with drafts, of a batch that verifies them.

    All see latents and the window.
    """
    shape, codec = ops.shape, ops.codec
    total = rows[0].shape[0]
    blocks = 2 + total // shape.block_size
    pages = torch.zeros(
        blocks, codec.layout.page_bytes(shape.num_kv_heads, shape.block_size), dtype=torch.uint8, device=device
    )
    size = shape.window_block_size
    count = 2 + total // size
    exact = torch.zeros(count, shape.num_kv_heads, size, 2 * shape.head_dim, dtype=shape.dtype, device=device)
    table = torch.arange(1, blocks, dtype=torch.int32, device=device)[None]
    window = torch.arange(1, count, dtype=torch.int32, device=device)[None]
    outputs, at = [], 0
    steps = [(prompt, False), (prompt + CHUNK, False), (prompt + CHUNK + 1, True)]
    for end, decoded in [*steps, (total, drafts < ops.max_decode_len)][: 3 + (drafts > 0)]:
        query, key, value = (x[at:end] for x in rows)
        step = _step(end - at, end, decoded, table, window)
        step = replace(step, plan=ops.plan_step(step))
        slots = step.positions + shape.block_size
        ops.store(key, value, pages, exact, slots, step.positions + size, step.positions)
        if at:  # the first chunk only fills the caches
            out = torch.empty_like(query)
            ops.attend(query, key, value, pages, exact, step, out)
            outputs += [out[0].float(), out[-1].float()]
        at = end
    return torch.stack(outputs).cpu()


def _rounding(codec: LayerCodec, shape: LayerShape, rows: list[torch.Tensor], want: torch.Tensor, run: tuple) -> float:
    """What half-precision tables alone do to the reference.

    Much, where a key mean dwarfs the rest of the key: random queries then have logits in the thousands. Such a layer
    is tested less sharply: keys stored one position off may pass, pages of another block do not.
    """
    tables = {n: getattr(codec.k, n).half().float() for n in ("decode", "mean", "mean_basis", "sink")}
    rounded = replace(codec, k=replace(codec.k, **tables))
    return float((_run(ReferenceOps(rounded, shape), rows, *run) - want).norm() / want.norm().clamp_min(1e-6))


def check_layer(ops: LayerOps, codec: LayerCodec, device: torch.device, name: str, drafts: int = 0) -> float:
    """Relative difference from the reference. Raises KernelError, naming the layer, if it is large or NaN.

    drafts: speculative tokens that the engine verifies at once.
    """
    if isinstance(ops, ReferenceOps) and type(ops) is ReferenceOps:
        return 0.0
    shape = ops.shape
    prompt = shape.window + 24
    gen = torch.Generator().manual_seed(0)
    rows = _rows(codec, prompt + CHUNK + 1 + (1 + drafts if drafts else 0), shape, device, gen)
    try:
        got = _run(ops, rows, prompt, drafts, device)
    except (RuntimeError, ValueError) as e:
        raise KernelError(f"layer {name!r}: kernels {ops.name!r} failed the start-up self-test: {e}") from e
    ops.forget_steps()
    codec, run = codec.to(device), (prompt, drafts, device)
    want = _run(ReferenceOps(codec, shape), rows, *run)
    error, allowed = float((got - want).norm() / want.norm().clamp_min(1e-6)), TOLERANCE[shape.dtype]
    if error > allowed:  # seldom, so that start-up does not pay for it
        allowed = min(MOST, max(allowed, 2 * _rounding(codec, shape, rows, want, run)))
    if not error <= allowed:
        raise KernelError(
            f"layer {name!r}: kernels {ops.name!r} differ from the reference by {error:.3g} (relative) in the start-up "
            "self-test; set kqsvd.implementation to another one, and report this"
        )
    return error
