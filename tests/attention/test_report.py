# SPDX-License-Identifier: Apache-2.0
"""Warnings of the boot report (its numbers are checked against vLLM's in test_engine)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
from vllm_kqsvd.attention.report import warnings_of  # noqa: E402


def test_warnings() -> None:
    config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=8192), lora_config=None)
    assert warnings_of(config, None) == [] == warnings_of(config, 8192)  # type: ignore[arg-type]
    assert "calibrated for 2,048 positions" in warnings_of(config, 2048)[0]  # type: ignore[arg-type]
    config.lora_config = object()
    assert "LoRA" in warnings_of(config, None)[0]  # type: ignore[arg-type]
