# SPDX-License-Identifier: Apache-2.0
"""The boot report: one INFO block with what is covered, what it costs and what it gains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.logger import init_logger

from vllm_kqsvd.attention.window import check_pool

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_kqsvd.attention.impl import KQSVDImpl

logger = init_logger("vllm.kqsvd")


def report_lines(config: VllmConfig, impls: list[KQSVDImpl], num_blocks: int) -> list[str]:
    """Lines of the report for one rank; capacities count windows and vLLM's null block."""
    first = impls[0]
    shape, spec = first.ops.shape, first.window_spec
    block = shape.block_size
    exact = sum(2 * i.num_kv_heads * i.head_size * i.dtype.itemsize for i in impls)
    latent = sum(i.num_kv_heads * i.ops.codec.plan.bytes_per_token for i in impls)
    page = block * latent
    window_blocks = spec.max_memory_usage_bytes(config) // spec.page_size_bytes
    longest = config.model_config.max_model_len
    per_request = -(-longest // block) + window_blocks
    tokens = num_blocks * longest // per_request
    plain = num_blocks * page // (block * exact) * block
    modes = ", ".join(sorted({i.rope_mode for i in impls}))
    world = config.parallel_config.tensor_parallel_size
    slower = sorted({reason for i in impls for reason in i.ops.passed_over})
    kernels = ", ".join(sorted({i.ops.name for i in impls}))
    return [
        "kqsvd: latent KV cache" + (f" (each of {world} tensor parallel ranks)" if world > 1 else ""),
        f"  layers      {len(impls)} of {len(impls)} attention layers",
        f"  per token   {latent:,} bytes instead of {exact:,} ({exact / latent:.2f}x), "
        f"{8 * latent / (exact / first.dtype.itemsize):.2f} bits per element, scales included",
        f"  window      last {shape.window} positions exact: at most {window_blocks} blocks = "
        f"{window_blocks * page / 2**20:.2f} MiB per running request",
        f"  KV tokens   {tokens:,} instead of {plain:,} in the same memory ({tokens / max(plain, 1):.2f}x at "
        f"{longest:,} tokens per request, windows counted)",
        f"  rope mode   {modes}",
        f"  kernels     {kernels}; pages of {block} tokens, windows of {shape.window_block_size}",
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


def announce(config: VllmConfig, impls: list[KQSVDImpl]) -> None:
    """Check the block pool and log the report, once the real cache is there.

    vLLM has no block count yet while it profiles CUDA graphs.
    """
    num_blocks = config.cache_config.num_gpu_blocks
    if num_blocks is None or not impls[0].is_first():
        return
    check_pool(impls[0].window_spec, impls[0].ops.shape.block_size, num_blocks, config)
    logger.info("%s", "\n".join(report_lines(config, impls, num_blocks)))
    for line in warnings_of(config, impls[0].max_position):
        logger.warning("kqsvd: %s", line)
