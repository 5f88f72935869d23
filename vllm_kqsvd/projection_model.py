# SPDX-License-Identifier: Apache-2.0
"""Which model a projection belongs to: shape, RoPE and a hash of some of its weights."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_kqsvd.errors import KQSVDError, ProjectionFileError
from vllm_kqsvd.projection_rope import RopeSetting, head_dim_of, rope_settings, text_config
from vllm_kqsvd.projection_schema import MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS, printable

HASHED_BYTES = 4096  # of each weight
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_KV_WEIGHT = re.compile(r"\.(k_proj|v_proj|qkv_proj|query_key_value|c_attn|Wqkv)\.(weight|qweight|weight_packed)$")
_OTHER_TOWER = re.compile(r"(^|\.)(visual|vision\w*|audio\w*|encoder|mtp\w*)\.")


@dataclass(frozen=True, eq=False)
class ModelFingerprint:
    """What must agree between the calibrated and the served model.

    rope: the distinct RoPE settings. weights_sha256: hex digest over the first 4096 bytes of every key
    and value weight as stored, in layer order; "" where the weights could not be read.
    """

    architecture: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: tuple[RopeSetting, ...]
    weights_sha256: str = ""

    @classmethod
    def from_config(cls, config: Any, weights_sha256: str = "") -> ModelFingerprint:
        """Fingerprint of a transformers config.

        Raises UnsupportedError for a RoPE nobody can code, ProjectionFileError for sizes no model has.
        """
        text = text_config(config)
        names = getattr(config, "architectures", None) or getattr(text, "architectures", None)
        layers, heads = _size(text, "num_hidden_layers", MAX_LAYERS), _size(text, "num_attention_heads", 64 * MAX_HEADS)
        head_dim = head_dim_of(text)
        if type(head_dim) is not int or not 1 <= head_dim <= MAX_HEAD_DIM:  # before tables of this width are made
            raise ProjectionFileError(f"the model's head_dim is {str(head_dim)[:20]!r}, not 1 to {MAX_HEAD_DIM}")
        return cls(
            (names or [text.model_type])[0],
            layers,
            heads,
            getattr(text, "num_key_value_heads", None) or heads,
            head_dim,
            tuple(rope_settings(text)[0]),
            weights_sha256,
        )

    @classmethod
    def from_hf(cls, model_dir: str | Path) -> ModelFingerprint:
        """Fingerprint of a local Hugging Face folder: its config.json, and a few kilobytes per weight.

        Raises ProjectionFileError if the folder has no readable config or its safetensors are damaged.
        """
        from transformers import AutoConfig

        folder = Path(model_dir)
        if not (folder / "config.json").is_file():
            raise ProjectionFileError(f"{folder} has no config.json; give a Hugging Face model folder")
        try:
            # Code that comes with a model is never run, and nobody is asked whether it should be.
            fingerprint = cls.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
        except KQSVDError as e:
            raise type(e)(printable(str(e))[:600]) from e
        except Exception as e:  # transformers' own, and whatever wrong types raise in it
            reason = printable(str(e))[:300] or type(e).__name__
            raise ProjectionFileError(f"cannot read {folder / 'config.json'} ({reason}); give a model folder") from e
        return replace(fingerprint, weights_sha256=weights_sha256(folder))

    def differences(self, served: ModelFingerprint) -> list[str]:
        """One phrase per disagreement, each naming the file's and the served model's value."""
        out = []
        for name in ("architecture", "num_layers", "num_heads", "num_kv_heads", "head_dim"):
            ours, theirs = getattr(self, name), getattr(served, name)
            if ours != theirs:
                out.append(f"{name} {ours} in the file, {theirs} in the model")
        missing = [r for r in self.rope if not any(r.matches(s) for s in served.rope)]
        if missing:
            theirs = " and ".join(s.describe() for s in served.rope)
            out.append(f"{missing[0].describe()} in the file, {theirs} in the model")
        a, b = self.weights_sha256, served.weights_sha256
        if a and b and a != b:
            out.append(f"weights {a[:12]} in the file, {b[:12]} in the model")
        return out

    def without_weights(self) -> ModelFingerprint:
        """The same, matching any weights."""
        return replace(self, weights_sha256="")


def weights_sha256(model_dir: str | Path) -> str:
    """Hash of the key and value weights of a folder of safetensors files; "" if there are none."""
    from safetensors import SafetensorError, safe_open

    found: list[tuple[int, str, Path]] = []
    try:
        for file in sorted(Path(model_dir).glob("*.safetensors")):
            if file.name == "kqsvd.safetensors":
                continue
            with safe_open(file, framework="pt") as f:
                found += [(_layer_of(name), name, file) for name in f.keys() if _is_kv(name)]
        digest = hashlib.sha256()
        for _, name, file in sorted(found):
            with safe_open(file, framework="pt") as f:
                digest.update(_first_bytes(f.get_slice(name)))
    except (SafetensorError, OSError) as e:
        reason = printable(str(e))[:300]
        raise ProjectionFileError(f"cannot read the model's weights in {model_dir}: {reason}") from e
    return digest.hexdigest() if found else ""


def _size(config: Any, name: str, high: int) -> int:
    value = getattr(config, name, None)
    if type(value) is not int or not 1 <= value <= high:
        raise ProjectionFileError(f"the model's config has {name} {str(value)[:20]!r}, not a number from 1 to {high}")
    return value


def _is_kv(name: str) -> bool:
    return bool(_KV_WEIGHT.search(name) and _LAYER.search(name) and not _OTHER_TOWER.search(name))


def _layer_of(name: str) -> int:
    match = _LAYER.search(name)
    assert match is not None
    return int(match[1])


def _first_bytes(part: Any) -> bytes:
    """The first HASHED_BYTES of a safetensors slice (whole rows are read, then cut)."""
    import torch

    shape = part.get_shape()
    rows = part[: min(shape[0], HASHED_BYTES)] if len(shape) == 1 else None
    if rows is None:
        width = max(1, shape[1])
        rows = part[: min(shape[0], -(-HASHED_BYTES // width))]
    data = rows.contiguous().view(torch.uint8).flatten()[:HASHED_BYTES]
    return data.numpy().tobytes()
