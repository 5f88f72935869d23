# SPDX-License-Identifier: Apache-2.0
"""What needs processes of its own or a compiler: tensor parallelism, torch.compile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

SCRIPT = """
import json, sys
from tests.attention.runs import generate, prompt_of
from vllm import LLM

def main():
    model, projection, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    llm = LLM(model, dtype="float32", max_model_len=512, kv_cache_memory_bytes=8 << 20, max_num_seqs=8,
              attention_backend="CUSTOM", additional_config={"kqsvd": {"projection": projection}}, **options)
    runs = generate(llm, [prompt_of(n, seed=n) for n in (3, 40)] + [prompt_of(300, seed=9)])
    print("RUNS", json.dumps([r.tokens for r in runs]))

if __name__ == "__main__":
    main()
"""


def tokens_of(folder: Path, options: dict[str, object], before: str = "", **env: str) -> list[list[int]]:
    """Greedy tokens of an engine in a process of its own; `before` runs in it once, first."""
    script = folder / "run.py"
    script.write_text(SCRIPT.replace("def main():", f"BEFORE = {before!r}\n\ndef main():\n    exec(BEFORE, {{}})"))
    root = str(Path(__file__).parents[2])
    command = [sys.executable, str(script), str(folder / "model"), str(folder / "p8"), json.dumps(options)]
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths, **env}, capture_output=True, text=True, timeout=900
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("RUNS ")]
    assert found, done.stderr[-4000:]
    return json.loads(found[0][5:])


@pytest.mark.slow
def test_two_ranks_and_compiled_graphs_answer_alike(tiny: Path) -> None:
    eager = tokens_of(tiny, {"enforce_eager": True})
    split = {"enforce_eager": True, "tensor_parallel_size": 2}
    spawn = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    assert tokens_of(tiny, split, **spawn) == eager
    assert tokens_of(tiny, {"enforce_eager": False}) == eager
