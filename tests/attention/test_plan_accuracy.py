# SPDX-License-Identifier: Apache-2.0
"""`kqsvd plan` says what vLLM then reports: five model shapes, started on the CPU with the same cache memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("vllm")
from tests.attention.conftest import engine  # noqa: E402
from tests.attention.models import write_model  # noqa: E402
from tests.helpers import random_codec, side_plan  # noqa: E402
from vllm_kqsvd import cli  # noqa: E402
from vllm_kqsvd.plan import LayerPlan  # noqa: E402
from vllm_kqsvd.projection import LayerEntry, ModelFingerprint, Projection, save_projection  # noqa: E402

MEMORY, CONTEXT = 48 << 20, 1024
# layers, query heads, KV heads, head_dim, bits of K groups, of V groups
SHAPES = {
    "llama": (2, 4, 2, 128, [4] * 8, [4] * 8),
    "smollm": (5, 3, 3, 64, [4, 4, 2, 2], [3, 3, 3, 3]),
    "multi-query": (3, 4, 1, 128, [4, 4, 2, 2, 2, 2, 2, 2], [3, 3, 3, 3, 2, 2, 2, 2]),
    "many heads": (2, 8, 8, 64, [4, 4, 2, 2], [2, 2, 2, 2]),
    "wide heads": (1, 2, 2, 256, [2] * 16, [2] * 16),
}


def write_projection(folder: Path, model: Path, name: str) -> Path:
    """A random projection of the shape's plan."""
    layers, _, heads, dim, k, v = SHAPES[name]
    plan = LayerPlan(side_plan(*k), side_plan(*v))
    codec = random_codec(plan, heads, dim, 0)
    entries = {
        i: LayerEntry(i, f"model.layers.{i}.self_attn", "post", 0, 0, 2048, "random", "random", codec)
        for i in range(layers)
    }
    save_projection(Projection(ModelFingerprint.from_hf(model), entries), folder)
    return folder


@pytest.mark.parametrize("name", SHAPES)
def test_kv_tokens_are_those_of_vllm(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layers, q_heads, heads, dim = SHAPES[name][:4]
    sizes = {"num_attention_heads": q_heads, "num_key_value_heads": heads, "head_dim": dim, "hidden_size": 32 * q_heads}
    model = write_model(tmp_path / "m", num_hidden_layers=layers, **sizes)
    projection = write_projection(tmp_path / "p", model, name)
    argv = ["plan", str(model), "--kv-memory", str(MEMORY), "--context", str(CONTEXT), "--json"]
    assert cli.main([*argv, "--projection", str(projection)]) == 0
    planned = {f["name"]: f["kv_tokens"] for f in json.loads(capsys.readouterr().out)["formats"]}
    options = {"dtype": "bfloat16", "max_model_len": CONTEXT, "kv_cache_memory_bytes": MEMORY}
    for used, row in ((projection, "this projection"), (None, "bf16")):
        with engine(model, used, kqsvd={"self_test": False} if used else {}, **options) as llm:
            reported = llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
        assert abs(planned[row] / reported - 1) < 0.01, f"{row}: planned {planned[row]}, vLLM reports {reported}"
