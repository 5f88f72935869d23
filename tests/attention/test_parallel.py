# SPDX-License-Identifier: Apache-2.0
"""Several workers answer as one: tensor parallel 3, more ranks than KV heads under ray, pipeline stages."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.attention.conftest import engine
from tests.attention.models import write_model, write_projection, write_unequal
from tests.attention.runs import generate, prompt_of
from tests.attention.test_processes import tokens_of

pytestmark = pytest.mark.slow

SPAWN = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
PROMPTS = [*(prompt_of(n, seed=n) for n in (3, 40)), prompt_of(300, seed=9)]
EAGER: dict[str, object] = {"enforce_eager": True, "skip_tokenizer_init": True}

# vLLM 0.32 does not admit ray on its CPU platform, though its executor needs nothing of a GPU but ids. Ray is started
# here with two ids that it takes for GPUs, and every process is told so.
RAY = """
import ray

def admit():
    from vllm.platforms.cpu import CpuPlatform
    CpuPlatform.ray_device_key = "GPU"

admit()
ray.init(num_cpus=4, num_gpus=2, include_dashboard=False, object_store_memory=100 << 20,
         runtime_env={"worker_process_setup_hook": admit})
"""


def prepared(folder: Path, unequal: bool = False, **overrides: object) -> list[list[int]]:
    """Write a model and its projection; tokens of one worker in this process."""
    model = write_model(folder / "model", **overrides)
    if unequal:
        whole, half = (write_projection(folder / f"{bits} bits", model, bits) for bits in (8, 4))
        write_unequal(folder / "p8", whole, half)
    else:
        write_projection(folder / "p8", model)
    with engine(folder / "model", folder / "p8", max_num_batched_tokens=512) as llm:
        return [r.tokens for r in generate(llm, PROMPTS)]


@pytest.mark.parametrize("layers", ["equal", "unequal"])
def test_three_tensor_parallel_ranks(tmp_path: Path, layers: str) -> None:
    shape = {"hidden_size": 192, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 384}
    alone = prepared(tmp_path, layers == "unequal", **shape, vocab_size=576)
    options = {**EAGER, "tensor_parallel_size": 3}
    assert tokens_of(tmp_path, options, **SPAWN, VLLM_CPU_OMP_THREADS_BIND="0|1|0") == alone


def test_more_ranks_than_kv_heads_under_ray(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    alone = prepared(tmp_path, num_key_value_heads=1)
    options = {**EAGER, "tensor_parallel_size": 2, "distributed_executor_backend": "ray"}
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    assert tokens_of(tmp_path, options, before=RAY, **env) == alone


def test_two_pipeline_stages(tmp_path: Path) -> None:
    """Traced by torch.compile, not compiled: without it vLLM's CPU worker makes no buffers between stages."""
    alone = prepared(tmp_path)
    options = {
        "skip_tokenizer_init": True, "pipeline_parallel_size": 2, "compilation_config": {"backend": "eager"}
    }  # fmt: skip
    assert tokens_of(tmp_path, options, **SPAWN, VLLM_CPU_OMP_THREADS_BIND="0|1") == alone
