# SPDX-License-Identifier: Apache-2.0
"""vllm_kqsvd: latent, mixed-bit KV cache for vLLM (KQ-SVD basis, SVDq bits)."""

__version__ = "0.1.0"
