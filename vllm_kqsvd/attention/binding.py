# SPDX-License-Identifier: Apache-2.0
"""From a loaded projection to one layer of one rank: which entry, which KV heads, which page, which window."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_kqsvd.errors import ConfigError, ProjectionFileError, UnsupportedError
from vllm_kqsvd.projection import ModelFingerprint, Projection, load_projection
from vllm_kqsvd.projection_model import weights_sha256
from vllm_kqsvd.projection_read import TENSOR_FILE

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.distributed.parallel_state import GroupCoordinator

    from vllm_kqsvd.codec import LayerCodec
    from vllm_kqsvd.config import KQSVDConfig


def _state(path: Path) -> tuple[int, int]:
    """Changes when the folder is replaced or its file rewritten."""
    try:
        return path.stat().st_ino, (path / TENSOR_FILE).stat().st_mtime_ns
    except OSError:  # gone between two looks: the reader has the words for it
        return 0, 0


@lru_cache(maxsize=4)
def _load(path: Path, state: tuple[int, int]) -> Projection:
    return load_projection(path)


def open_projection(config: KQSVDConfig) -> Projection:
    """The projection of this run, read once per process. Raises ConfigError, ProjectionFileError."""
    path = config.projection
    if not path.is_dir():
        raise ConfigError(f"kqsvd.projection is {str(path)!r}; there is no such folder on this machine")
    projection = _load(path, _state(path))
    if config.digest and not projection.digest.startswith(config.digest):
        raise ProjectionFileError(
            f"projection with digest {config.digest} asked for; {path} has {projection.digest[:16]}; "
            "give every machine the same folder, or correct kqsvd.digest"
        )
    return projection


def check_same_everywhere(digest: str, name: str, first: str, groups: Iterable[GroupCoordinator]) -> None:
    """Raise unless all layers of all ranks have the projection `digest`, whose folder may be replaced meanwhile.

    first: digest that this process bound first. groups: parallel groups whose rank 0 is asked; all ranks must call.
    """
    for other in (first, *(g.broadcast_object(digest, src=0) for g in groups if g.world_size > 1)):
        if other != digest:
            raise ProjectionFileError(
                f"layer {name!r} found the projection {digest[:16]}, others {other[:16]}: the folder was replaced "
                "while the server started, or machines have different ones; start again"
            )


def check_served_model(projection: Projection, model: ModelConfig) -> None:
    """Raise ProjectionFileError unless the projection belongs to the served model (weights, if local, included)."""
    local = Path(model.model)
    weights = weights_sha256(local) if local.is_dir() else ""
    projection.check_model(ModelFingerprint.from_config(model.hf_config, weights))


def mean_bytes(projection: Projection) -> int | None:
    """Bytes per token and head of a layer on average, rounded down, if layers differ; None if all are equal."""
    sizes = [e.codec.plan.bytes_per_token for e in projection.layers.values()]
    return sum(sizes) // len(sizes) if len(set(sizes)) > 1 else None


def check_unequal_pages(projection: Projection, pipeline_stages: int, native_layers: int) -> None:
    """Raise if layers differ in bytes and vLLM could not pack their pages side by side in one block."""
    sizes = Counter(e.codec.plan.bytes_per_token for e in projection.layers.values())
    if len(sizes) == 1:
        return
    found = f"a projection whose layers take {min(sizes)} to {max(sizes)} bytes per token and head found"
    if pipeline_stages > 1 or native_layers:
        raise UnsupportedError(
            f"{found}; beside layers that keep vLLM's own cache, and in pipeline stages, vLLM would pad all pages to "
            "the largest; use a projection of `kqsvd calibrate --layer-budgets equal`"
        )
    if len(set(sizes.values())) == 1:
        raise UnsupportedError(
            f"{found}, each size in {next(iter(sizes.values()))} layers; vLLM takes that for a repeating pattern and "
            "splits the windows over half-empty blocks; give one layer another size"
        )


def shard(codec: LayerCodec, num_kv_heads: int, rank: int, world_size: int, name: str) -> LayerCodec:
    """The codec of the KV heads that `rank` of `world_size` holds (heads are split, or repeated if too few)."""
    total = codec.num_kv_heads
    if total == num_kv_heads:
        return codec
    if total == num_kv_heads * world_size:
        return codec.heads(rank * num_kv_heads, (rank + 1) * num_kv_heads)
    if num_kv_heads == 1 and world_size % total == 0:
        head = rank * total // world_size
        return codec.heads(head, head + 1)
    raise ProjectionFileError(
        f"layer {name!r} has {num_kv_heads} KV heads on each of {world_size} ranks; the projection has {total}; "
        "calibrate the model that is served"
    )


def check_shape(codec: LayerCodec, head_size: int, block_size: int, name: str) -> None:
    """Raise unless the codec's width and the cache's block size suit the layer."""
    if codec.head_dim != head_size:
        raise ProjectionFileError(
            f"layer {name!r} has head size {head_size}; the projection has {codec.head_dim}; "
            "calibrate the model that is served"
        )
    if block_size % 64:
        raise UnsupportedError(
            f"--block-size {block_size} asked for; latent pages hold a multiple of 64 tokens; "
            "leave --block-size out (128) or set it to 64, 128 or 256"
        )
