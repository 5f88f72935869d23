# SPDX-License-Identifier: Apache-2.0
"""Two data parallel engines behind one server: both answer as one engine does, each reports its own cache."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from benchmarks.answers import body_of, solo  # noqa: E402
from benchmarks.demo_server import OFFLINE, Server  # noqa: E402
from tests.attention.conftest import engine  # noqa: E402
from tests.attention.runs import generate, prompt_of  # noqa: E402
from tests.reliability import LONG  # noqa: E402

PROMPTS = [prompt_of(n, seed=n) for n in (3, 17, 40, 40, 90, 130, 200, 300)]
TOKENS = 12


@pytest.mark.reliability
@pytest.mark.skipif(not LONG, reason="two engines start slowly: make reliability")
def test_two_engines_answer_as_one(tiny: Path, tmp_path: Path) -> None:
    with engine(tiny / "model", tiny / "p8", max_num_batched_tokens=512) as llm:
        alone = [generate(llm, [p], max_tokens=TOKENS)[0].tokens for p in PROMPTS]
        kv_tokens = llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
    options = {
        "data-parallel-size": 2, "api-server-count": 1, "dtype": "float32", "max-model-len": 512,
        "kv-cache-memory-bytes": 8 << 20,
        "max-num-batched-tokens": 512, "max-num-seqs": 16, "attention-backend": "CUSTOM",
        "additional-config": json.dumps({"kqsvd": {"projection": str(tiny / "p8")}}),
    }  # fmt: skip
    arguments = ["--enforce-eager", *(x for k, v in options.items() for x in (f"--{k}", str(v)))]
    env = {**OFFLINE, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with Server(tiny / "model", arguments, tmp_path / "server.log", environment=env) as server:
        assert [solo(server, p, TOKENS).tokens for p in PROMPTS[-2:]] == alone[-2:]
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            answers = pool.map(lambda p: server.post(body_of(p, TOKENS)), PROMPTS)
            assert [a["choices"][0]["token_ids"] for a in answers] == alone
        text = server._get("/metrics")
    for number in (0, 1):
        done = re.search(rf'vllm:request_success_total{{engine="{number}",finished_reason="length".*}} (\S+)', text)
        assert done and float(done[1]) > 0
        assert re.search(rf'vllm_kqsvd:kv_tokens{{engine="{number}".*}} {float(kv_tokens)}', text)
    assert server.log.read_text().count(f"KV tokens   {kv_tokens:,}") == 2
