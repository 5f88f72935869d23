# SPDX-License-Identifier: Apache-2.0
"""The boot report: one INFO block with what is covered, what it costs and what it gains."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.logger import init_logger

from vllm_kqsvd.attention import native
from vllm_kqsvd.attention.nan_guard import NanGuard
from vllm_kqsvd.attention.window import check_pool
from vllm_kqsvd.errors import UnsupportedError
from vllm_kqsvd.plan import layer_range
from vllm_kqsvd.status import RankStatus, publish

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_kqsvd.attention.impl import KQSVDImpl

logger = init_logger("vllm.kqsvd")


def status_of(config: VllmConfig, impls: list[KQSVDImpl], num_blocks: int) -> RankStatus:
    """This rank's numbers; capacities count windows and vLLM's null block."""
    first = impls[0]
    shape, spec = first.ops.shape, first.window_spec
    block = shape.block_size
    exact = sum(2 * i.num_kv_heads * i.head_size * i.dtype.itemsize for i in impls)
    latent = sum(i.num_kv_heads * i.ops.codec.plan.bytes_per_token for i in impls)
    window_blocks = spec.max_memory_usage_bytes(config) // spec.page_size_bytes
    groups, others = native.groups_of(config, len(impls))
    beside = len(native.layers_of(config))
    layers = Counter(f"{i.rope_mode}/{i.ops.name}" for i in impls) + Counter({"native/vllm": beside})
    longest = config.model_config.max_model_len
    tested = [i.self_test_error for i in impls if i.self_test_error is not None]
    parallel = config.parallel_config
    pipeline, tensor = get_pp_group().rank_in_group, get_tensor_model_parallel_rank()
    return RankStatus(
        engine=parallel.data_parallel_index,
        rank=pipeline * parallel.tensor_parallel_size + tensor,
        pipeline_rank=pipeline,
        tensor_rank=tensor,
        digest=first.digest,
        kernels=", ".join(sorted({i.ops.name for i in impls})),
        layers=dict(layers),
        latent_bytes=latent,
        exact_bytes=exact,
        bits_per_element=8 * latent / (exact / first.dtype.itemsize),
        block_size=block,
        window=shape.window,
        window_block_size=shape.window_block_size,
        window_blocks=window_blocks,
        num_blocks=num_blocks,
        kv_tokens=num_blocks * longest // (groups * (-(-longest // block) + window_blocks) + others),
        # what a mixed model would hold natively depends on vLLM's grouping of all its layers
        kv_tokens_exact=0 if beside else num_blocks * block * latent // (block * exact) * block,
        max_model_len=longest,
        self_test={"passed": len(tested), "skipped": len(impls) - len(tested)},
        self_test_error=max(tested, default=0.0),
    )


def report_lines(config: VllmConfig, impls: list[KQSVDImpl], status: RankStatus) -> list[str]:
    """Lines of the report for one rank."""
    first, page = impls[0], status.block_size * status.latent_bytes
    latent, exact, plain = status.latent_bytes, status.exact_bytes, status.kv_tokens_exact
    others = len(native.layers_of(config))
    covered = f"{len(impls)} of {len(impls) + others} attention layers"
    if others:
        covered += f" compressed, {others} keep vLLM's own cache"
    gained = (
        f"{status.kv_tokens:,} instead of {plain:,} in the same memory "
        f"({status.kv_tokens / max(plain, 1):.2f}x at {status.max_model_len:,} tokens per request, windows counted)"
    )
    if others:
        gained = f"{status.kv_tokens:,} at {status.max_model_len:,} tokens per request, all layers and windows counted"
    modes = ", ".join(sorted({i.rope_mode for i in impls}))
    world = config.parallel_config.tensor_parallel_size
    bits = sorted(i.ops.codec.plan.bits_per_element(i.head_size) for i in impls)
    slower = sorted({reason for i in impls for reason in i.ops.passed_over})
    return [
        "kqsvd: latent KV cache" + (f" (each of {world} tensor parallel ranks)" if world > 1 else ""),
        f"  layers      {covered}",
        f"  per token   {latent:,} bytes instead of {exact:,} ({exact / latent:.2f}x), "
        f"{status.bits_per_element:.2f} bits per element{layer_range(bits[0], bits[-1])}, scales included",
        f"  window      last {status.window} positions exact: at most {status.window_blocks} blocks = "
        f"{status.window_blocks * page / 2**20:.2f} MiB per running request",
        f"  KV tokens   {gained}",
        f"  rope mode   {modes}",
        f"  kernels     {status.kernels}; pages of {status.block_size} tokens, windows of {status.window_block_size}",
        *(f"  not used    {reason}" for reason in slower),
        f"  projection  {first.config.projection} (digest {first.digest[:16] or 'none'})",
    ]


def warnings_of(config: VllmConfig, max_position: int | None) -> list[str]:
    """What works but may cost quality, one sentence each."""
    out, longest = [], config.model_config.max_model_len
    if max_position is not None and max_position < longest:
        out.append(
            f"the projection was calibrated for {max_position:,} positions and --max-model-len is {longest:,}; keys "
            "beyond lose quality; lower --max-model-len or calibrate for longer contexts"
        )
    if config.lora_config is not None:
        out.append("LoRA adapters change keys and values; the projection was calibrated without them")
    return out


def check_reach(config: VllmConfig, impls: list[KQSVDImpl], num_blocks: int) -> None:
    """Raise if kernels could not address all pages of a layer, which may lie a block of all layers apart."""
    pages = [i.latent_page()[1] for i in impls]
    side_by_side = config.cache_config.get_resolved_kv_cache_layout().is_block_outermost
    span = num_blocks * (sum(pages) if side_by_side else max(pages))
    limit, kernels = min((i.ops.max_cache_bytes, i.ops.name) for i in impls)
    if span > limit:
        raise UnsupportedError(
            f"vllm_kqsvd: a cache of {span / 2**30:.0f} GiB with layers side by side found; the {kernels} kernels "
            f"reach {limit / 2**30:.0f} GiB; set --kv-cache-memory-bytes {limit} or use a projection of "
            "`kqsvd calibrate --layer-budgets equal`"
        )


def announce(config: VllmConfig, impls: list[KQSVDImpl]) -> NanGuard | None:
    """Check the block pool, log the report and publish it for /metrics, once the real cache is there.

    impls: of all compressed layers. vLLM has no block count yet while it profiles CUDA graphs. Returns the guard of
    the last layer, to be polled.
    """
    num_blocks = config.cache_config.num_gpu_blocks
    if num_blocks is None:
        return None
    tokens, page = impls[0].latent_page()
    check_reach(config, impls, num_blocks)
    check_pool(impls[0].window_spec, tokens, num_blocks, config, native.groups_of(config, len(impls)))
    padding = native.padding_warning(native.layers_of(config), page // tokens)
    status = status_of(config, impls, num_blocks)
    logger.info("%s", "\n".join(report_lines(config, impls, status)))
    for line in [*warnings_of(config, impls[0].max_position), *([padding] if padding else [])]:
        logger.warning("kqsvd: %s", line)
    publish(status)
    impls[-1].nan_guard = NanGuard(impls[-1].device, status)
    return impls[-1].nan_guard
