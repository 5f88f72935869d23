# SPDX-License-Identifier: Apache-2.0
"""How transformers is to load a checkpoint for calibration and `kqsvd verify`: quantized weights are expanded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def loading_options(folder: str | Path) -> dict[str, Any]:
    """Arguments for `from_pretrained` beside dtype: 8-bit weights of compressed-tensors become ordinary ones.

    Their compressed layers want kernels that CPUs lack and pass no gradient. Other checkpoints: nothing.
    """
    config = Path(folder) / "config.json"
    stored = json.loads(config.read_text()).get("quantization_config") if config.is_file() else None
    if not isinstance(stored, dict) or stored.get("quant_method") != "compressed-tensors":
        return {}
    from transformers import CompressedTensorsConfig

    return {"quantization_config": CompressedTensorsConfig(run_compressed=False)}
