# SPDX-License-Identifier: Apache-2.0
"""A tensor parallel worker that is killed: the server ends with an error, and the next one starts and answers alike."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm")

from benchmarks.answers import solo  # noqa: E402
from tests.attention.models import write_model, write_projection  # noqa: E402
from tests.attention.runs import prompt_of  # noqa: E402
from tests.reliability import LONG  # noqa: E402
from tests.reliability.server import Server, assert_dies_clearly  # noqa: E402

OPTIONS = {"tensor-parallel-size": 2, "max-num-seqs": 8, "kv-cache-memory-bytes": 16 << 20}


def shared_memory() -> set[str]:
    """Segments that vLLM's processes share."""
    return {f.name for f in Path("/dev/shm").iterdir() if f.name.startswith(("psm_", "vllm", "torch_"))}


@pytest.mark.slow
@pytest.mark.skipif(not LONG, reason="three server starts; make reliability")
def test_a_killed_worker_ends_the_server_and_the_next_starts(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", num_hidden_layers=2)
    write_projection(tmp_path / "p", model, 8, layers=2)
    prompts = [prompt_of(n, seed=n) for n in (3, 40, 200)]
    answers, port, before = [], 0, shared_memory()
    for life, victim in enumerate(("Worker_TP1", "Worker_TP0", "")):
        server = Server(model, tmp_path / "p", tmp_path / f"{life}.log", port, **OPTIONS)
        port = server.port
        try:
            server.wait_ready()
            assert server.log.read_text().count("(each of 2 tensor parallel ranks)") == 2
            answers.append([solo(server, p, 8).tokens for p in prompts])
            if victim:
                assert_dies_clearly(server, victim)
        finally:
            server.stop()
        print(victim, "left in shared memory:", shared_memory() - before)
    assert answers[0] == answers[1] == answers[2]
