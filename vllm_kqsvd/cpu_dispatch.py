# SPDX-License-Identifier: Apache-2.0
"""What `CPU_ATTN` resolves to on CPUs: `Backend` is ours if the user asked for CUSTOM, else vLLM's own.

vLLM resolves the dotted path with getattr at every selection, so the choice follows the current config.
"""

from __future__ import annotations


def __getattr__(name: str) -> type:
    if name != "Backend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.config import get_current_vllm_config_or_none
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    config = get_current_vllm_config_or_none()
    if config is not None and config.attention_config.backend is AttentionBackendEnum.CUSTOM:
        from vllm_kqsvd.attention.backend import KQSVDBackend

        return KQSVDBackend
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    return CPUAttentionBackend
