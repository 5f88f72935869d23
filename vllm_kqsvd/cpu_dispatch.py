# SPDX-License-Identifier: Apache-2.0
"""What vLLM's CPU backends resolve to: ours if the user asked for CUSTOM, else vLLM's own.

vLLM resolves the dotted path with getattr at every selection, so the choice follows the current config. On CPUs it
does not look at the backend that was asked for, so multi-head latent attention would go its own way uncompressed and
without a word; here it is refused.
"""

from __future__ import annotations

from importlib import import_module

HOME = "vllm.v1.attention.backends."
NATIVE = {  # member of AttentionBackendEnum: (module, class)
    "CPU_ATTN": ("cpu_attn", "CPUAttentionBackend"),
    "CPU_MLA": ("mla.cpu_mla", "CPUMLABackend"),
    "AMX_MLA": ("mla.amx_mla", "AMXMLABackend"),
}


def __getattr__(name: str) -> type:
    if name not in NATIVE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.config import get_current_vllm_config_or_none
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    config = get_current_vllm_config_or_none()
    if config is not None and config.attention_config.backend is AttentionBackendEnum.CUSTOM:
        if name == "CPU_ATTN":
            from vllm_kqsvd.attention.backend import KQSVDBackend

            return KQSVDBackend
        from vllm_kqsvd.attention.refusals import MLA
        from vllm_kqsvd.errors import UnsupportedError

        raise UnsupportedError(f"vllm_kqsvd: {MLA}")
    module, cls = NATIVE[name]
    return getattr(import_module(HOME + module), cls)
