# SPDX-License-Identifier: Apache-2.0
"""Reading of a projection folder: header, declared shapes, then tensors, each checked before the next.

Memory is bounded by the file's own size: the header is capped, and no tensor is touched before the sum of
the declared shapes equals the bytes the file has.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from vllm_kqsvd.codec import LayerCodec, SideCodec
from vllm_kqsvd.errors import KQSVDError, ProjectionFileError
from vllm_kqsvd.projection import LayerEntry, Projection
from vllm_kqsvd.projection_model import ModelFingerprint
from vllm_kqsvd.projection_rope import RopeSetting
from vllm_kqsvd.projection_schema import (
    FORMAT,
    MAX_HEADER_BYTES,
    SIDES,
    Header,
    canonical,
    fail,
    parse_header,
    parse_json,
    printable,
    tensor_shapes,
)

TENSOR_FILE = "kqsvd.safetensors"
CONFIG_FILE = "kqsvd_config.json"
SIDE_TENSORS = ("encode", "decode", "scale_weight", "guard_weight", "mean_basis", "mean", "sink")


def read_folder(folder: Path) -> Projection:
    """See `projection.load_projection`."""
    try:
        return _read_present(folder)
    except ProjectionFileError as e:
        raise ProjectionFileError(f"projection {folder}: {printable(str(e))[:600]}") from e
    except (OSError, ValueError) as e:  # ValueError: a path with a NUL byte
        reason = getattr(e, "strerror", None) or printable(str(e)[:80])
        raise ProjectionFileError(f"projection {folder}: cannot be read ({reason})") from e


def _read_present(folder: Path) -> Projection:
    """Read the folder that has the name now; again if another took its place meanwhile (`kqsvd calibrate` does)."""
    for last in (False, False, True):
        try:
            at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError) as e:
            raise ProjectionFileError("no such folder; give one written by `kqsvd calibrate`") from e
        try:
            return _read(at)
        except (ProjectionFileError, OSError):
            if last or _is_still(folder, at):
                raise
        finally:
            os.close(at)
    raise AssertionError("unreachable")


def _is_still(folder: Path, at: int) -> bool:
    try:
        return os.path.samestat(os.stat(folder), os.fstat(at))
    except OSError:
        return False


def _read(folder: int) -> Projection:
    """Both files through one descriptor of their folder, so that they belong together."""
    try:
        file = _open_regular(TENSOR_FILE, folder)
    except FileNotFoundError as e:
        raise ProjectionFileError(f"has no {TENSOR_FILE}; give a folder written by `kqsvd calibrate`") from e
    with file as f:
        raw, start, data_bytes = _raw_header(f)
        metadata = raw.pop("__metadata__", None)
        if not isinstance(metadata, dict) or not isinstance(metadata.get(FORMAT), str):
            raise fail(f"{TENSOR_FILE} has no `{FORMAT}` header")
        data = parse_json(metadata[FORMAT])
        header = parse_header(data)
        check_declared(raw, header, data_bytes)
        _check_config(folder, data)
        f.seek(0)
        content = f.read(start + data_bytes)  # a copy: the file may change under us, a mapping would too
    try:
        tensors = load(content)
    except (SafetensorError, ValueError, RuntimeError) as e:
        raise fail(f"{TENSOR_FILE} is not a safetensors file ({str(e)[:80]})") from e
    if tensors.keys() != raw.keys() or digest_of(tensors, data) != header.digest:
        raise fail("the digest does not match the content")
    return assemble(header, tensors)


def _open_regular(name: str, folder: int) -> BinaryIO:
    """Open for reading; a pipe, device or folder is refused at once. Symbolic links are followed."""
    fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ProjectionFileError(f"{name} is not a regular file")
    return os.fdopen(fd, "rb")


def _raw_header(f: BinaryIO) -> tuple[dict[str, Any], int, int]:
    """(JSON of a safetensors header, its end, bytes after it)."""
    size = os.fstat(f.fileno()).st_size
    length = int.from_bytes(f.read(8), "little")
    if size < 8 or length > size - 8:
        raise fail(f"{TENSOR_FILE} is truncated: {size} bytes")
    if length > MAX_HEADER_BYTES:
        raise fail(f"{TENSOR_FILE} has a header of {length} bytes; at most {MAX_HEADER_BYTES} are read")
    text = f.read(length)
    if len(text) != length:
        raise fail(f"{TENSOR_FILE} is truncated")
    return parse_json(text), 8 + length, size - 8 - length


def check_declared(raw: dict[str, Any], header: Header, data_bytes: int) -> None:
    """Every promised tensor is declared with the promised type, shape and place, and no other."""
    declared: dict[str, list[int]] = {}
    for name, entry in raw.items():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 1 << 63 for n in shape):
            raise fail(f"tensor {name[:80]!r} has no shape")
        declared[name] = shape
    want = tensor_shapes(header, declared)
    if missing := sorted(want.keys() - declared.keys()):
        raise fail(f"tensor {missing[0]} is missing ({len(missing)} in all)")
    if extra := sorted(declared.keys() - want.keys()):
        raise fail(f"tensor {extra[0][:80]!r} is unknown ({len(extra)} in all)")
    spans = []
    for name, (dtype, shape) in want.items():
        entry = raw[name]
        if entry.get("dtype") != dtype or tuple(declared[name]) != shape:
            found = f"{str(entry.get('dtype'))[:8]} {str(declared[name])[:60]}"
            raise fail(f"tensor {name} is {found}, not {dtype} {list(shape)}")
        span = entry.get("data_offsets")
        size = (8 if dtype == "F64" else 4) * math.prod(shape)
        if not (isinstance(span, list) and len(span) == 2 and all(type(n) is int for n in span)):
            raise fail(f"tensor {name} has no offsets")
        if span[0] < 0 or span[1] - span[0] != size:
            raise fail(f"tensor {name} lies at bytes {str(span)[:60]}, it needs {size} bytes")
        spans.append(tuple(span))
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise fail("tensors overlap or leave holes")
        end = stop
    if end != data_bytes:
        raise fail(f"{TENSOR_FILE} is truncated or too long: {data_bytes} bytes of tensors, {end} declared")


def _check_config(folder: int, data: dict[str, Any]) -> None:
    """kqsvd_config.json, where it is there, says the same as the header."""
    if CONFIG_FILE not in os.listdir(folder):
        return
    with _open_regular(CONFIG_FILE, folder) as f:
        text = f.read(MAX_HEADER_BYTES + 1)
    if canonical(parse_json(text)) != canonical(data):
        raise fail(f"{CONFIG_FILE} and the header of {TENSOR_FILE} differ")


def digest_of(tensors: Mapping[str, torch.Tensor], data: dict[str, Any]) -> str:
    """sha256 over "name dtype d0,d1\\n" and the little-endian bytes of every tensor in name order, then over
    the canonical JSON without `digest`; hex."""
    h = hashlib.sha256()
    for name in sorted(tensors):
        x = tensors[name].contiguous()
        dtype = "F64" if x.dtype == torch.float64 else "F32"
        h.update(f"{name} {dtype} {','.join(map(str, x.shape))}\n".encode())
        h.update(x.numpy().data)
    h.update(canonical({k: v for k, v in data.items() if k != "digest"}))
    return h.hexdigest()


def assemble(header: Header, tensors: Mapping[str, torch.Tensor]) -> Projection:
    """A Projection from checked parts. Raises ProjectionFileError for values no codec can have."""
    for name, x in tensors.items():
        if not torch.isfinite(x).all():
            raise fail(f"tensor {name} has NaN or infinite values")
        if name.endswith(("_weight", "inv_freq", "spectrum")) and bool((x < 0).any()):
            raise fail(f"tensor {name} has negative values")
    rope = tuple(
        RopeSetting(dim, interleaved, kind, parameters, tensors[f"rope.{n}.inv_freq"])
        for n, (dim, interleaved, kind, parameters) in enumerate(header.rope)
    )
    model = ModelFingerprint(
        header.architecture,
        header.num_layers,
        header.num_heads,
        header.num_kv_heads,
        header.head_dim,
        rope,
        header.weights_sha256,
    )
    layers = {}
    for layer in header.layers:
        at = f"layers.{layer.index}."
        sides = {
            side: SideCodec(layer.plan[side], *(tensors[f"{at}{side}.{name}"] for name in SIDE_TENSORS))
            for side in SIDES
        }
        spectrum = {s: tensors[f"{at}{s}.spectrum"] for s in SIDES if f"{at}{s}.spectrum" in tensors}
        try:
            codec = LayerCodec(sides["k"], sides["v"], rope[layer.rope].spec(), layer.rope_block)
        except KQSVDError as e:
            raise fail(f"layer {layer.index}: {e}") from e
        layers[layer.index] = LayerEntry(
            layer.index,
            layer.name,
            layer.rope_mode,
            layer.rope_block,
            layer.rope,
            layer.max_position,
            layer.basis["k"],
            layer.basis["v"],
            codec,
            spectrum or None,
        )
    return Projection(model, layers, header.calibration, header.predicted, header.digest, header.created_by)
