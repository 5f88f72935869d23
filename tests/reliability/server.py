# SPDX-License-Identifier: Apache-2.0
"""A real vLLM server on the CPU with a tiny model, and what its end must look like."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

from benchmarks import demo_server
from benchmarks.answers import Json, body_of
from tests.reliability.folders import environment


class Server(demo_server.Server):
    """A started server of a tiny model with a projection; options as on vLLM's command line."""

    def __init__(self, model: Path, projection: Path, log: Path, port: int = 0, **options: object) -> None:
        settings = {
            "max-model-len": 512, "max-num-seqs": 256, "kv-cache-memory-bytes": 64 << 20, "dtype": "float32", **options
        }  # fmt: skip
        arguments = ["--enforce-eager", "--disable-uvicorn-access-log", "--attention-backend", "CUSTOM"]
        arguments += ["--additional-config", json.dumps({"kqsvd": {"projection": str(projection)}})]
        for name, value in settings.items():
            arguments += [f"--{name}", str(value)]
        bind = "|".join("0" for _ in range(int(str(settings.get("tensor-parallel-size", 1)))))
        env = environment(
            VLLM_ENABLE_V1_MULTIPROCESSING="1",
            VLLM_CPU_OMP_THREADS_BIND=bind if "|" in bind else "nobind",
            **demo_server.OFFLINE,
        )
        super().__init__(model, arguments, log, port, env)
        self.start()

    def metric(self, name: str) -> float:
        """Sum of a metric over its labels."""
        return self.metrics().get(name, 0.0)


def assert_dies_clearly(server: Server, title: str) -> None:
    """Kill the process with this title under a long request: an error for the client, an exit, nobody left behind.

    The exit status is vLLM's: 0 where uvicorn could still shut down in order, so supervisors must restart always.
    """
    (victim,) = (pid for pid, name in server.members().items() if title in name)
    answers: list[Json | Exception] = []

    def ask() -> None:
        try:
            answers.append(server.post(body_of([5, 6, 7], 500)))
        except Exception as e:
            answers.append(e)

    asking = threading.Thread(target=ask)
    asking.start()
    end = time.monotonic() + 30
    while not server.metric("vllm:num_requests_running"):
        assert time.monotonic() < end and not answers, answers
    os.kill(victim, signal.SIGKILL)
    asking.join(120)
    assert not asking.is_alive(), "the client hangs"
    assert isinstance(answers[0], OSError), answers  # an HTTP status of 500 or a closed connection
    server.process.wait(120)
    end = time.monotonic() + 60
    while left := server.members():
        assert time.monotonic() < end, left
        time.sleep(0.5)
    log = server.log.read_text()
    assert "died unexpectedly" in log or "EngineDeadError" in log, server.tail()
