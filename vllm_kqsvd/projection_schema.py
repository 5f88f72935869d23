# SPDX-License-Identifier: Apache-2.0
"""The JSON header of a projection file: strict parsing, and what tensors it promises.

Nothing here touches tensors, so a hostile header costs no more than its own size.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_kqsvd.codec import MEAN_RANK
from vllm_kqsvd.errors import PlanError, ProjectionFileError
from vllm_kqsvd.plan import GROUP, SidePlan
from vllm_kqsvd.projection_rope import ROPE_TYPES

FORMAT = "kqsvd"
SCHEMA_VERSION = 1
MAX_HEADER_BYTES = 4 << 20
MAX_LAYERS, MAX_HEADS, MAX_HEAD_DIM, MAX_ROPE_BLOCK = 1024, 1024, 1024, 1 << 16
MAX_GROUPS, MAX_PLANES = MAX_HEAD_DIM // GROUP, 128  # 128 half planes fill 64 groups of 8 bits
MAX_TENSOR_BYTES = 4 << 30
MAX_DEPTH = 32  # of nested JSON
ROPE_MODES = ("page", "pre", "post", "none")
SIDES = ("k", "v")
_NAME = re.compile(r"[A-Za-z0-9_.+\-]{1,256}")
_HEX = re.compile(r"([0-9a-f]{64})?")


@dataclass(frozen=True)
class LayerHeader:
    """The JSON entry of one layer, checked."""

    index: int
    name: str
    rope_mode: str
    rope_block: int
    rope: int
    max_position: int | None
    plan: dict[str, SidePlan]
    basis: dict[str, str]
    head_dim: int


@dataclass(frozen=True)
class Header:
    """The checked JSON. `rope`: (rotary_dim, interleaved, type, parameters) of every setting."""

    architecture: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: list[tuple[int, bool, str, dict[str, Any]]]
    weights_sha256: str
    layers: list[LayerHeader]
    calibration: dict[str, Any]
    predicted: list[float]
    digest: str
    created_by: str


def fail(reason: str) -> ProjectionFileError:
    """The error of a header that is not what the format says."""
    return ProjectionFileError(f"{reason}; the file is damaged or was not written by vllm_kqsvd")


def printable(text: str) -> str:
    """The text with control characters escaped: what a file holds must not steer a terminal or forge log lines."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def parse_json(text: str | bytes) -> dict[str, Any]:
    """A JSON object without duplicate keys, infinities or NaN. Raises ProjectionFileError."""
    if len(text) > MAX_HEADER_BYTES:
        raise fail(f"JSON of {len(text)} bytes; at most {MAX_HEADER_BYTES} are read")
    try:
        data = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        raise fail(f"the JSON cannot be parsed ({str(e)[:80] or type(e).__name__})") from e
    if not isinstance(data, dict):
        raise fail("the JSON is not an object")
    level: list[Any] = [data]
    for _ in range(MAX_DEPTH):
        level = [x for v in level for x in (v.values() if isinstance(v, dict) else v) if isinstance(x, dict | list)]
        if not level:
            return data
    raise fail(f"the JSON is nested deeper than {MAX_DEPTH}")


def canonical(data: dict[str, Any]) -> bytes:
    """UTF-8 of the JSON with sorted keys and without blanks. Raises ProjectionFileError if not JSON."""
    try:
        text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as e:
        raise fail(f"the header is not plain JSON ({str(e)[:80]})") from e
    return text.encode()


def parse_header(data: dict[str, Any]) -> Header:
    """Check the JSON of a projection file. Raises ProjectionFileError."""
    if data.get("format") != FORMAT:
        raise ProjectionFileError(
            f"format {str(data.get('format'))[:40]!r} found, {FORMAT!r} expected; "
            "give a folder written by `kqsvd calibrate`"
        )
    if data.get("schema_version") != SCHEMA_VERSION:
        raise ProjectionFileError(
            f"the file has schema version {repr(data.get('schema_version'))[:40]}, this vllm_kqsvd reads "
            f"version {SCHEMA_VERSION}; calibrate again, or use the vllm_kqsvd version that wrote the file"
        )
    model = _get(data, "model", dict)
    kv_heads = _int(model, "num_kv_heads", 1, MAX_HEADS)
    heads = _int(model, "num_heads", 1, 64 * MAX_HEADS)
    if heads % kv_heads:
        raise fail(f"{heads} heads do not divide among {kv_heads} KV heads")
    num_layers = _int(model, "num_layers", 1, MAX_LAYERS)
    head_dim = _int(model, "head_dim", GROUP, MAX_HEAD_DIM)
    rope = [_rope(r, head_dim) for r in _list(model, "rope", dict, MAX_LAYERS)]
    entries = _list(data, "layers", dict, MAX_LAYERS)
    if len(entries) > num_layers:
        raise fail(f"{len(entries)} layers found, the model has {num_layers}")
    layers = [_layer(e, _int(e, "index", 0, num_layers - 1), rope) for e in entries]  # some may keep their cache
    if any(a.index >= b.index for a, b in itertools.pairwise(layers)):
        raise fail("a layer is out of order")
    if len({layer.name for layer in layers}) != len(layers):
        raise fail("two layers have the same name")
    predicted = data.get("predicted")
    if not isinstance(predicted, list) or not all(_is_number(p) for p in predicted):
        raise fail("`predicted` is not a list of numbers")
    if len(predicted) not in (0, len(layers)):
        raise fail(f"`predicted` has {len(predicted)} values for {len(layers)} layers")
    return Header(
        _text(model, "architecture"),
        num_layers,
        heads,
        kv_heads,
        head_dim,
        rope,
        _text(model, "weights_sha256", _HEX),
        layers,
        _get(data, "calibration", dict),
        [float(p) for p in predicted],
        _text(data, "digest", _HEX),
        _text(data, "created_by"),
    )


def tensor_shapes(header: Header, declared: Mapping[str, Sequence[int]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors a header promises: name -> (safetensors dtype, shape).

    declared: shapes the file states; read only for the offsets and the rank of a mean table and for whether
    spectra are there. Raises ProjectionFileError if those are out of range.
    """
    want: dict[str, tuple[str, tuple[int, ...]]] = {}
    for n, (rotary_dim, *_) in enumerate(header.rope):
        want[f"rope.{n}.inv_freq"] = ("F64", (rotary_dim // 2,))
    heads = header.num_kv_heads
    for layer in header.layers:
        dim = layer.head_dim
        for side in SIDES:
            at, rank = f"layers.{layer.index}.{side}.", layer.plan[side].rank
            offsets, width = _mean_table(at, layer.rope_block if side == "k" else 0, declared)
            shapes = {
                "encode": (heads, dim, rank),
                "decode": (heads, rank, dim),
                "scale_weight": (heads, rank),
                "guard_weight": (heads, rank),
                "mean_basis": (offsets, width),
                "mean": (heads, width, dim),
                "sink": (heads, width, dim),
            }
            if at + "spectrum" in declared:
                shapes["spectrum"] = (heads, dim)
            want |= {at + name: ("F32", shape) for name, shape in shapes.items()}
    size = sum((8 if d == "F64" else 4) * math.prod(shape) for d, shape in want.values())
    if size > MAX_TENSOR_BYTES:
        raise fail(f"{size} bytes of tensors declared; at most {MAX_TENSOR_BYTES} are read")
    return want


def _mean_table(at: str, rope_block: int, declared: Mapping[str, Sequence[int]]) -> tuple[int, int]:
    shape, rows = declared.get(at + "mean_basis"), max(rope_block, 1)  # one row, or one per position in a block
    if shape is None:
        raise fail(f"tensor {at}mean_basis is missing")
    if len(shape) != 2 or shape[0] not in (1, rows) or not 1 <= shape[1] <= MEAN_RANK:
        raise fail(f"{at}mean_basis has shape {list(shape)[:4]}, not [1 or {rows}, 1 to {MEAN_RANK}]")
    return int(shape[0]), int(shape[1])


def _rope(data: dict[str, Any], head_dim: int) -> tuple[int, bool, str, dict[str, Any]]:
    rotary_dim = _int(data, "rotary_dim", 0, MAX_HEAD_DIM)
    if rotary_dim % 2:
        raise fail(f"rotary_dim {rotary_dim} is odd")
    kind = _get(data, "type", str)
    if kind not in ROPE_TYPES:
        raise fail(f"RoPE type {kind[:40]!r} is not one of {ROPE_TYPES}")
    parameters = _get(data, "parameters", dict)
    if not _is_number(parameters.get("attention_factor")) or parameters["attention_factor"] <= 0:
        raise fail("a RoPE setting has no positive attention_factor")
    for name, value in parameters.items():
        flat = value if isinstance(value, list) else [value]
        if not _NAME.fullmatch(name) or len(flat) > 16 or not all(type(x) is bool or _is_number(x) for x in flat):
            raise fail(f"RoPE parameter {name[:40]!r} is not a number, a truth value or a short list of them")
    return rotary_dim, _get(data, "interleaved", bool), kind, parameters


def _layer(data: dict[str, Any], index: int, rope: list[tuple[int, bool, str, dict[str, Any]]]) -> LayerHeader:
    mode, block = _get(data, "rope_mode", str), _int(data, "rope_block", 0, MAX_ROPE_BLOCK)
    if mode not in ROPE_MODES:
        raise fail(f"layer {index} has rope_mode {mode[:40]!r}, not one of {ROPE_MODES}")
    right = {"page": block > 1 and block & (block - 1) == 0, "pre": block == 1}.get(mode, block == 0)
    if not right:
        raise fail(f"layer {index} has rope_block {block} in mode {mode!r}")
    at = _int(data, "rope", 0, len(rope) - 1)
    if block and rope[at][3].get("mrope_section"):
        raise fail(f"layer {index} has mode {mode!r} with multi-dimensional positions")
    head_dim = _int(data, "head_dim", GROUP, MAX_HEAD_DIM)
    if head_dim % GROUP or rope[at][0] > head_dim:
        raise fail(f"layer {index} has head_dim {head_dim} with {rope[at][0]} rotated dimensions")
    longest = None
    if data.get("max_position", ...) is not None:  # null where the frame does not depend on it, but never absent
        longest = _int(data, "max_position", 1, 1 << 40)
    plan = {side: _plan(data.get(side), index, side) for side in SIDES}
    if any(p.rank > head_dim for p in plan.values()):
        raise fail(f"layer {index} has more latent channels than head_dim {head_dim}")
    names = _get(data, "basis", dict)
    basis = {side: _text(names, side, _NAME) for side in SIDES}
    return LayerHeader(index, _text(data, "name", _NAME), mode, block, at, longest, plan, basis, head_dim)


def _plan(data: Any, index: int, side: str) -> SidePlan:
    if not isinstance(data, list) or len(data) > MAX_PLANES or not all(map(_is_plane, data)):
        raise fail(f"layer {index} has no {side} plan of the form [[num_bits, [group, ...]], ...]")
    try:
        return SidePlan.from_json(data)
    except PlanError as e:
        raise fail(f"layer {index}, {side} plan: {str(e)[:200]}") from e


def _is_plane(x: Any) -> bool:
    if not isinstance(x, list) or len(x) != 2 or not isinstance(x[1], list):
        return False
    return all(type(n) is int and 0 <= n < MAX_GROUPS for n in [x[0], *x[1]])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("duplicate keys")
    return out


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _is_number(x: Any) -> bool:
    return type(x) in (int, float) and abs(x) < 1e30  # false for NaN and infinity


def _get(data: dict[str, Any], key: str, kind: type) -> Any:
    value = data.get(key)
    if not isinstance(value, kind):
        raise fail(f"`{key}` is missing or not a {kind.__name__}")
    return value


def _int(data: dict[str, Any], key: str, low: int, high: int) -> int:
    value = data.get(key)
    if type(value) is not int or not low <= value <= high:
        raise fail(f"`{key}` is missing or not an integer from {low} to {high}")
    return value


def _list(data: dict[str, Any], key: str, kind: type, longest: int) -> list[Any]:
    value = _get(data, key, list)
    if not 0 < len(value) <= longest or not all(isinstance(x, kind) for x in value):
        raise fail(f"`{key}` is not a list of 1 to {longest} entries")
    return value


def _text(data: dict[str, Any], key: str, pattern: re.Pattern[str] = _NAME) -> str:
    value = _get(data, key, str)
    if not pattern.fullmatch(value):
        raise fail(f"`{key}` is not a name of the allowed form")
    return value
