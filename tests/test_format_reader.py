# SPDX-License-Identifier: Apache-2.0
"""docs/format.md is enough to write a reader: one written from it alone, with numpy and the standard library."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import random_codec, side_plan
from tests.projections import tiny_config
from vllm_kqsvd.ops import reference
from vllm_kqsvd.plan import LayerPlan
from vllm_kqsvd.projection import LayerEntry, ModelFingerprint, Projection, save_projection

BLOCK, HEADS, DIM = 64, 2, 64
TYPES = {"F32": "<f4", "F64": "<f8"}


def read_folder(folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Section 3: the JSON and the tensors; checks the digest."""
    blob = (folder / "kqsvd.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", blob[:8])
    header = json.loads(blob[8 : 8 + size])
    config = json.loads(header.pop("__metadata__")["kqsvd"])
    assert config == json.loads((folder / "kqsvd_config.json").read_text())
    assert config["format"] == "kqsvd" and config["schema_version"] == 1
    tensors, digest = {}, hashlib.sha256()
    for name in sorted(header):
        begin, end = (8 + size + x for x in header[name]["data_offsets"])
        shape = header[name]["shape"]
        tensors[name] = np.frombuffer(blob[begin:end], TYPES[header[name]["dtype"]]).reshape(shape)
        digest.update(f"{name} {header[name]['dtype']} {','.join(map(str, shape))}\n".encode() + blob[begin:end])
    bare = {k: v for k, v in config.items() if k != "digest"}
    digest.update(json.dumps(bare, sort_keys=True, separators=(",", ":")).encode())
    assert config["digest"] == digest.hexdigest()
    return config, tensors


def plane_bytes(plane: list) -> int:
    """Bytes per token of a plane: 16 if it lists 8 / num_bits groups, 8 if half of that."""
    bits, groups = plane
    return 16 if len(groups) == 8 // bits else 8


def codes_of(tile: bytes, planes: list, start: int, side: str) -> tuple[np.ndarray, np.ndarray]:
    """Section 2: codes [16 tokens, R] and the width of every channel, from a tile's planes beginning at `start`."""
    rank = 16 * (1 + max(g for _, groups in planes for g in groups))
    codes, width = np.zeros((16, rank), int), np.zeros(rank, int)
    for bits, groups in planes:
        full = plane_bytes([bits, groups]) == 16
        for i, group in enumerate(groups):
            for channel in range(16):
                y, low = divmod(channel, 8)
                c = 16 * group + channel
                width[c] += bits
                for r in range(16):
                    if side == "k":
                        t, h = divmod(low, 2)
                        word = 4 * r + t if full else 4 * (r % 8) + t
                    else:
                        word, h = (8 * (r // 2) if full else 8 * (r // 2 % 4)) + low, r % 2
                    byte = tile[start + 4 * word + 2 * h + (y if full else r // 8)]
                    shift = i * bits if full else (2 * i + y) * bits
                    codes[r, c] = codes[r, c] << bits | (byte >> shift & (1 << bits) - 1)
        start += 16 * plane_bytes([bits, groups])
    return codes, width


def scale_of(byte: int) -> tuple[float, bool]:
    """Section 2: a scale byte's value and class."""
    return 2.0 ** ((byte >> 3 & 15) - 8) * (1 + (byte & 7) / 8), byte >= 128


def rotate(x: np.ndarray, position: int, inv_freq: np.ndarray, interleaved: bool) -> np.ndarray:
    """R_position x."""
    n = len(inv_freq)
    first, second = (np.arange(n) * 2, np.arange(n) * 2 + 1) if interleaved else (np.arange(n), np.arange(n) + n)
    cos, sin = np.cos(position * inv_freq), np.sin(position * inv_freq)
    out = x.astype(float).copy()
    out[first], out[second] = x[first] * cos - x[second] * sin, x[second] * cos + x[first] * sin
    return out


def read_page(page: bytes, layer: dict, tensors: dict[str, np.ndarray], config: dict, first: int) -> np.ndarray:
    """Sections 1 and 2: decoded keys and values [2, heads, tokens, d] of a page whose first token stands at `first`."""
    i, frame = layer["index"], layer["rope_block"]
    inv_freq = tensors[f"rope.{layer['rope']}.inv_freq"]
    interleaved = config["model"]["rope"][layer["rope"]]["interleaved"]
    size = {side: sum(map(plane_bytes, layer[side])) for side in "kv"}
    tile_bytes = 16 * (size["k"] + size["v"] + 2)
    out = np.zeros((2, HEADS, BLOCK, DIM))
    for n in range(HEADS * BLOCK // 16):
        head, tile = divmod(n, BLOCK // 16)
        data = page[n * tile_bytes : (n + 1) * tile_bytes]
        for s, side in enumerate("kv"):
            codes, width = codes_of(data, layer[side], 0 if side == "k" else 16 * size["k"], side)
            get = {k: tensors[f"layers.{i}.{side}.{k}"] for k in ("decode", "mean_basis", "mean", "sink")}
            for r in range(16):
                position = first + 16 * tile + r
                j = position % frame if frame and side == "k" else 0
                scale, sink = scale_of(data[16 * (size["k"] + size["v"]) + 16 * s + r])
                mean = get["mean_basis"][j] @ get["sink" if sink else "mean"][head]
                x = ((codes[r] - (2.0 ** (width - 1) - 0.5)) * scale) @ get["decode"][head] + mean
                if side == "k" and frame:
                    x = rotate(x, position - j, inv_freq, interleaved)
                out[s, head, 16 * tile + r] = x
    return out


@pytest.mark.parametrize(
    ("k", "v", "mode"),
    [
        ((4, 4, 2, 2), (3, 3, 3, 3), "page"),
        ((6, 4, 2), (5, 3, 3, 1), "page"),
        ((8, 8, 8, 8), (2, 2), "pre"),
        ((3, 3, 3, 3), (4, 4, 2, 2), "post"),
    ],
)
def test_a_reader_made_from_the_specification_agrees(
    k: tuple[int, ...], v: tuple[int, ...], mode: str, tmp_path: Path
) -> None:
    frame = {"page": 32, "pre": 1, "post": 0}[mode]
    model = ModelFingerprint.from_config(tiny_config(head_dim=DIM, num_key_value_heads=HEADS, num_hidden_layers=1))
    codec = random_codec(LayerPlan(side_plan(*k), side_plan(*v)), HEADS, DIM, frame, seed=3)
    codec = replace(codec, rope=model.rope[0].spec())
    limit = 4096 if mode == "post" else None
    entry = LayerEntry(0, "model.layers.0.self_attn", mode, frame, 0, limit, "random", "random", codec)
    save_projection(Projection(model, {0: entry}), tmp_path / "p")

    gen = torch.Generator().manual_seed(0)
    first = 5 * BLOCK
    positions = torch.arange(first, first + BLOCK)
    rows = [torch.randn(BLOCK, HEADS, DIM, generator=gen) for _ in "kv"]
    rows[0][7] = (codec.k.mean_basis[7 % max(frame, 1)] @ codec.k.sink).float()  # a sink before it is turned
    page = torch.zeros(1, codec.layout.page_bytes(HEADS, BLOCK), dtype=torch.uint8)
    reference.store_latent(*rows, page, torch.arange(BLOCK), positions, codec, BLOCK)
    want = torch.stack(reference.dequantize(page, torch.arange(BLOCK), positions, codec, BLOCK)).transpose(1, 2)

    config, tensors = read_folder(tmp_path / "p")
    got = read_page(page.numpy().tobytes(), config["layers"][0], tensors, config, first)
    assert np.abs(got - want.numpy()).max() < 1e-4 * np.abs(want.numpy()).max()


def test_the_golden_folder_is_read() -> None:
    config, tensors = read_folder(Path(__file__).parent / "data" / "projection_v1")
    assert config["model"]["num_layers"] == 2 and tensors["layers.0.k.decode"].shape == (1, 16, 16)
