# SPDX-License-Identifier: Apache-2.0
"""What is refused at start-up, one sentence each: what was asked, what was found, what to do instead.

vLLM validates backends on CUDA only, so the same checks run when a layer's impl is made. `layer_refusal`
sees one layer's attention, `engine_refusal` the settings of the whole engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

    from vllm_kqsvd.ops.interface import LayerOps

KV_DTYPES = ("auto", "bfloat16", "float16")
SAFE_SPECULATORS = ("ngram", "[ngram]", "ngram_gpu", "suffix")
LEAVE_OUT = "or serve without --attention-backend CUSTOM"
MLA = "a model with multi-head latent attention found; its cache is latent already; serve it without CUSTOM"


def layer_refusal(
    *,
    head_size: int,
    num_heads: int,
    num_kv_heads: int,
    kv_cache_dtype: str,
    attn_type: str,
    alibi_slopes: object,
    sinks: object,
    kv_sharing_target: str | None,
    extra: dict[str, object],
) -> str | None:
    """Why a layer cannot be served from latent pages, or None."""
    if attn_type != "decoder":
        return f"{attn_type} attention asked for; only causal decoder attention has a latent cache; {LEAVE_OUT}"
    if alibi_slopes is not None or extra.get("use_alibi_sqrt"):
        return f"ALiBi slopes found; logits depend on positions outside the latent space; {LEAVE_OUT}"
    if sinks is not None:
        return f"learned attention sinks found; the kernels have no such term; {LEAVE_OUT}"
    if kv_sharing_target is not None:
        return (
            f"a layer that reads the cache of {kv_sharing_target} found; layers sharing a cache are not supported; "
            f"{LEAVE_OUT}"
        )
    if kv_cache_dtype not in KV_DTYPES:
        return (
            f"a KV cache in {kv_cache_dtype} asked for (by --kv-cache-dtype or by the checkpoint); latent pages have "
            "their own bit widths; set --kv-cache-dtype bfloat16 and choose bits when calibrating"
        )
    if head_size % 16 or num_heads % num_kv_heads:
        return f"head size {head_size}, {num_heads} heads on {num_kv_heads}; head size must be a multiple of 16"
    if unknown := [k for k, v in extra.items() if v is not None and v not in (False, -1) and k != "sinks"]:
        return f"attention options {', '.join(sorted(unknown))} found; they are not supported; {LEAVE_OUT}"
    return None


def engine_refusal(config: VllmConfig) -> str | None:
    """Why this engine's settings and the latent cache do not go together, or None."""
    parallel, scheduler, model = config.parallel_config, config.scheduler_config, config.model_config
    speculative = config.speculative_config
    if model.use_mla:
        return MLA
    if model.is_encoder_decoder:
        return f"an encoder-decoder model found; only decoders are supported; {LEAVE_OUT}"
    if parallel.decode_context_parallel_size > 1:
        return (
            f"--decode-context-parallel-size {parallel.decode_context_parallel_size} asked for; pages are not "
            "split over ranks by position; set it to 1"
        )
    if getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        return "--prefill-context-parallel-size above 1 asked for; it is not supported; set it to 1"
    if not connector_allowed(config):
        return (
            "a KV connector asked for; connectors do not compare projections, so two nodes could exchange pages "
            "that neither can read; remove --kv-transfer-config and --kv-offloading-size"
        )
    if scheduler.disable_hybrid_kv_cache_manager:
        return (
            "--disable-hybrid-kv-cache-manager asked for; the exact recent window is a cache group of its own; "
            "remove the option"
        )
    if speculative is not None and speculative.method not in SAFE_SPECULATORS:
        return (
            f"speculative method {speculative.method!r} asked for; a drafter's layers have no projection, and vLLM "
            "does not serve them well from a cache group of their own; use method 'ngram' or no speculation"
        )
    if _batch_invariant():
        return "VLLM_BATCH_INVARIANT=1 asked for; the kernels do not promise it; unset it"
    return None


def draft_refusal(ops: LayerOps, num_speculative_tokens: int) -> str | None:
    """Why these kernels cannot verify so many drafts, or None.

    With asynchronous scheduling only the device knows how many drafts of the last step were accepted.
    """
    if not ops.needs_host_lengths or num_speculative_tokens < ops.max_decode_len:
        return None
    return (
        f"{num_speculative_tokens} speculative tokens asked for; the {ops.name} kernels verify at most "
        f"{ops.max_decode_len - 1}; lower num_speculative_tokens"
    )


def connector_allowed(config: VllmConfig) -> bool:
    """No KV connector, or the one that only fills this process's own pages to measure decode speed."""
    transfer = config.kv_transfer_config
    return transfer is None or transfer.kv_connector in (None, "DecodeBenchConnector")


def rope_refusal(model: ModelConfig, rope_modes: set[str]) -> str | None:
    """Why the file's key frames and the served model's positions do not go together, or None."""
    turned = rope_modes & {"page", "pre"}
    if turned and model.uses_mrope:
        return (
            f"a projection in rope mode {sorted(turned)[0]!r} and a model with multimodal RoPE found; its positions "
            "have three axes, so there are no rope blocks; calibrate with rope mode 'post'"
        )
    rope = getattr(model.hf_text_config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, dict) else None
    if turned and kind in ("dynamic", "longrope"):
        return (
            f"a model with {kind} RoPE found; its rotations change with the sequence length, so keys cannot be "
            "turned back to their rope block; calibrate with rope mode 'post'"
        )
    return None


def dtype_refusal(dtype: torch.dtype) -> str | None:
    """Why the model's dtype cannot be served, or None."""
    if dtype in (torch.bfloat16, torch.float16, torch.float32):
        return None
    return f"dtype {dtype} asked for; use bfloat16, float16 or float32"


def _batch_invariant() -> bool:
    import vllm.envs as envs

    return bool(getattr(envs, "VLLM_BATCH_INVARIANT", False))
