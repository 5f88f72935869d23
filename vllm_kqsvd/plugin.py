# SPDX-License-Identifier: Apache-2.0
"""vLLM entry point (group `vllm.general_plugins`): registers the backend behind `--attention-backend CUSTOM`.

Runs in every vLLM process, possibly several times; imports neither torch nor the backend itself.
"""

from __future__ import annotations

import logging

from vllm_kqsvd.status import open_session

BACKEND = "vllm_kqsvd.attention.backend.KQSVDBackend"
CPU_DISPATCH = "vllm_kqsvd.cpu_dispatch"
CPU_BACKENDS = ("CPU_ATTN", "CPU_MLA", "AMX_MLA")

logger = logging.getLogger("vllm.kqsvd")


def register() -> None:
    """Register with vLLM. Installing the package changes nothing until CUSTOM is asked for."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backend import AttentionBackend
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if not hasattr(AttentionBackend, "customize_spec"):
        import vllm

        logger.warning(
            "vllm_kqsvd: vLLM %s has no customizable cache specs; needed is vLLM 0.32 or 0.33. Not registered.",
            vllm.__version__,
        )
        return
    open_session()
    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
    if current_platform.is_cpu():
        # The CPU platform ignores the selected backend and resolves one of these, which may be overridden;
        # the override hands vLLM's own backend back unless CUSTOM was asked for.
        for name in CPU_BACKENDS:
            if name in AttentionBackendEnum.__members__:
                register_backend(AttentionBackendEnum[name], f"{CPU_DISPATCH}.{name}")
