# SPDX-License-Identifier: Apache-2.0
"""The projection file: bases, means, steps and bit plans of every layer of one model (docs/format.md, 3).

Written once by the calibrator, read at every boot. `load_projection` trusts nothing it reads;
`save_projection` leaves a complete folder or none.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vllm_kqsvd import __version__
from vllm_kqsvd.codec import LayerCodec
from vllm_kqsvd.errors import ProjectionFileError
from vllm_kqsvd.projection_model import ModelFingerprint
from vllm_kqsvd.projection_rope import RopeSetting, no_rope, rope_settings

__all__ = [
    "LayerEntry",
    "ModelFingerprint",
    "Projection",
    "RopeSetting",
    "load_projection",
    "no_rope",
    "rope_settings",
    "save_projection",
]

_WRAPPERS = frozenset(("language_model", "text_model", "model", "llm"))


@dataclass(frozen=True, eq=False)
class LayerEntry:
    """One attention layer of the file.

    rope_mode: frame of the keys, "page" | "pre" | "post" | "none"; rope_block: T (1 for pre, 0 for post
    and none); rope: index into `model.rope`; max_position: calibrated range, None where the frame does
    not depend on it. k_basis, v_basis: names of the bases. spectrum: {"k", "v"} -> [H, d] float32,
    variance of every latent channel before bits were chosen, or None.
    """

    index: int
    name: str
    rope_mode: str
    rope_block: int
    rope: int
    max_position: int | None
    k_basis: str
    v_basis: str
    codec: LayerCodec
    spectrum: dict[str, torch.Tensor] | None = None

    @property
    def bytes_per_token(self) -> int:
        """Latent bytes per token, all KV heads of the entry, scales included."""
        return self.codec.num_kv_heads * self.codec.plan.bytes_per_token


@dataclass(frozen=True, eq=False)
class Projection:
    """All of a projection folder. `predicted`: relative logit error per layer, [] if not computed.

    `digest` is the sha256 of the file it was read from, "" for one that was never saved.
    """

    model: ModelFingerprint
    layers: dict[int, LayerEntry]
    calibration: dict[str, Any] = field(default_factory=dict)
    predicted: list[float] = field(default_factory=list)
    digest: str = ""
    created_by: str = __version__

    def find(self, name: str) -> LayerEntry | None:
        """The entry of an attention module, by its name in the HF model or in vLLM (`...self_attn.attn`).

        Wrappers' prefixes do not count. None for a layer the file does not know, such as a draft model's.
        """
        core = _core_name(name.removesuffix(".attn"))
        for entry in self.layers.values():
            if name == entry.name or core == _core_name(entry.name):
                return entry
        return None

    def layer(self, name: str) -> LayerEntry:
        """As `find`, but raises ProjectionFileError."""
        entry = self.find(name)
        if entry is None:
            raise ProjectionFileError(
                f"layer {name!r} asked for; the projection has {len(self.layers)} layers of "
                f"{self.model.architecture}, such as {next(iter(self.layers.values())).name!r}; "
                "calibrate the model that is served"
            )
        return entry

    def check_model(self, model: str | Path | Any) -> None:
        """Raise ProjectionFileError, naming both sides, unless the file belongs to `model`.

        model: a local Hugging Face folder (weights are checked too), a transformers config or a
        ModelFingerprint.
        """
        if isinstance(model, ModelFingerprint):
            served = model
        elif isinstance(model, str | Path):
            served = ModelFingerprint.from_hf(model)
        else:
            served = ModelFingerprint.from_config(model)
        if different := self.model.differences(served):
            raise ProjectionFileError(
                "the projection was made for another model: "
                + "; ".join(different)
                + "; calibrate the model that is served, or give the projection made for it"
            )

    def at_heads(self, start: int, stop: int) -> Projection:
        """The projection of KV heads [start, stop) of every layer (a tensor parallel shard)."""
        if not 0 <= start < stop <= self.model.num_kv_heads:
            raise ProjectionFileError(f"KV heads {start} to {stop} asked for; the file has {self.model.num_kv_heads}")
        cut = {}
        for i, entry in self.layers.items():
            spectrum = entry.spectrum and {s: t[start:stop] for s, t in entry.spectrum.items()}
            cut[i] = replace(entry, codec=entry.codec.heads(start, stop), spectrum=spectrum)
        return replace(self, layers=cut)

    @property
    def bytes_per_token(self) -> int:
        """Latent bytes per token of the whole model, scales included, exact window excluded."""
        return sum(e.bytes_per_token for e in self.layers.values())

    @property
    def layer_bits(self) -> tuple[float, float]:
        """Bits per element, scales included, of the layer with fewest bytes and of the one with most."""
        bits = [e.codec.plan.bits_per_element(e.codec.head_dim) for e in self.layers.values()]
        return min(bits), max(bits)

    def compression_ratio(self, element_size: int = 2) -> float:
        """Bytes of an uncompressed cache over latent bytes, per token; the exact window not counted."""
        plain = sum(2 * e.codec.num_kv_heads * e.codec.head_dim for e in self.layers.values())
        return element_size * plain / self.bytes_per_token


def _core_name(name: str) -> str:
    """The module name without the prefixes that wrappers add."""
    parts = name.split(".")
    while parts and parts[0] in _WRAPPERS:
        parts = parts[1:]
    return ".".join(parts)


def save_projection(projection: Projection, out_dir: str | Path) -> str:
    """Write the folder and return its digest. Equal projections give equal bytes.

    Raises ProjectionFileError if the projection is not valid, if `out_dir` exists and is not a
    projection folder, or if it cannot be written (nothing is left under the final name then).
    """
    from vllm_kqsvd.projection_write import write_folder

    return write_folder(projection, Path(out_dir))


def load_projection(path: str | Path) -> Projection:
    """Read and check a projection folder; float32 tensors on the CPU.

    Raises ProjectionFileError for anything that is not exactly a version 1 projection. Declared shapes are
    compared with the file's size before anything is allocated.
    """
    from vllm_kqsvd.projection_read import read_folder

    return read_folder(Path(path))
