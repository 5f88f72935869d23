# SPDX-License-Identifier: Apache-2.0
"""An OpenAI server of real vLLM on the CPU in processes of its own, and requests to it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.reliability.folders import environment

READY_SECONDS = 600
Json = dict[str, Any]


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """A running server; its log; every process it started, by the session they share."""

    def __init__(self, model: Path, projection: Path, log: Path, port: int = 0, **options: object) -> None:
        self.port, self.log = port or free_port(), log
        settings = {
            "max-model-len": 512, "max-num-seqs": 256, "kv-cache-memory-bytes": 64 << 20, "dtype": "float32", **options
        }  # fmt: skip
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
            "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(self.port), "--enforce-eager",
            "--disable-uvicorn-access-log", "--attention-backend", "CUSTOM",
            "--additional-config", json.dumps({"kqsvd": {"projection": str(projection)}}),
        ]  # fmt: skip
        for name, value in settings.items():
            command += [f"--{name}", str(value)]
        bind = "|".join("0" for _ in range(int(str(settings.get("tensor-parallel-size", 1)))))
        env = environment(
            VLLM_ENABLE_V1_MULTIPROCESSING="1",
            VLLM_CPU_OMP_THREADS_BIND=bind if "|" in bind else "nobind",
            VLLM_NO_USAGE_STATS="1",
        )
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )

    def wait_ready(self) -> Server:
        """Return once it answers; fails with the log's end if it does not."""
        end = time.monotonic() + READY_SECONDS
        while not self.healthy():
            assert self.process.poll() is None and time.monotonic() < end, self.tail()
            time.sleep(0.5)
        return self

    def healthy(self) -> bool:
        """Whether the health check passes."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def tail(self) -> str:
        """The end of the log."""
        return self.log.read_text()[-6000:]

    def post(self, body: Json, seconds: float = 120) -> Json:
        """One completion."""
        url = f"http://127.0.0.1:{self.port}/v1/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=seconds) as answer:
            return json.load(answer)

    def metric(self, name: str) -> float:
        """Sum of a metric over its labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((name + "{", name + " ")))

    def members(self) -> dict[int, str]:
        """Living processes of the server's session: id -> title."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                stat = (entry / "stat").read_text()
                title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            except OSError:
                continue
            fields = stat[stat.rindex(")") + 2 :].split()
            if int(fields[3]) == self.process.pid and fields[0] != "Z":
                found[int(entry.name)] = title
        return found

    def stop(self) -> None:
        """End it kindly, then for sure."""
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            pass
        for pid in self.members():
            os.kill(pid, signal.SIGKILL)
        self.process.wait(60)


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


@dataclass(frozen=True)
class Solo:
    """What a prompt answers alone: tokens, and at each step the five best and how far they are from the best."""

    tokens: list[int]
    behind: list[dict[str, float]]  # log probability


def body_of(prompt: list[int], max_tokens: int, **more: object) -> Json:
    """A greedy completion of token ids that returns token ids."""
    return {
        "model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
        "return_token_ids": True, **more,
    }  # fmt: skip


def solo(server: Server, prompt: list[int], max_tokens: int) -> Solo:
    """The greedy answer while the server does nothing else."""
    choice = server.post(body_of(prompt, max_tokens, logprobs=5))["choices"][0]
    steps = choice["logprobs"]["top_logprobs"]
    return Solo(choice["token_ids"], [{token: max(d.values()) - p for token, p in d.items()} for d in steps])
