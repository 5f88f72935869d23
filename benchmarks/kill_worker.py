# SPDX-License-Identifier: Apache-2.0
"""Kill one worker of a tensor-parallel server in mid-request: how does it end, and does it serve after a restart?

python -m benchmarks.kill_worker MODEL PROJECTION
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

from benchmarks.demo_server import Server

LOG = Path("kill_worker.log")


def serve(model: str, projection: str) -> Server:
    """A TP 2 server, to be entered."""
    arguments = ["--tensor-parallel-size", "2", "--max-model-len", "2048", "--kv-cache-memory-bytes", "1G"]
    arguments += ["--gpu-memory-utilization", "0.1", "--enforce-eager", "--attention-backend", "CUSTOM"]
    arguments += ["--additional-config", json.dumps({"kqsvd": {"projection": projection}})]
    return Server(Path(model), arguments, LOG)


def ask(server: Server, model: str, tokens: int) -> str:
    """A greedy completion."""
    body = {"model": model, "prompt": "One, two, three,", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        server.url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return json.loads(urllib.request.urlopen(request, timeout=60).read())["choices"][0]["text"]


def workers_of(server: Server) -> list[int]:
    """Process ids of this server's workers, which share its session, by rank."""
    command = ["ps", "-o", "pid=,args=", "--sid", str(server.process.pid)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [int(x.split()[0]) for x in sorted(lines, key=lambda x: x.split()[1]) if "VLLM::Worker" in x]


def kill_worker(model: str, projection: str) -> None:
    """Print what happens."""
    seen: list[str] = []
    with serve(model, projection) as server:
        before = ask(server, model, 16)
        print(f"server answers {before!r}", flush=True)

        def long_request() -> None:
            try:
                seen.append(ask(server, model, 1900))
            except (OSError, ValueError) as error:
                seen.append(f"{type(error).__name__}: {error}")

        client = threading.Thread(target=long_request)
        client.start()
        time.sleep(2)
        workers = workers_of(server)
        print(f"workers {workers}; killing the last", flush=True)
        os.kill(workers[-1], signal.SIGKILL)
        begin = time.perf_counter()
        try:
            code: int | str = server.process.wait(60)
        except subprocess.TimeoutExpired:
            code = "nothing: it still runs"
        print(f"server ended with {code} after {time.perf_counter() - begin:.1f} s", flush=True)
        client.join(70)
    errors = [x for x in LOG.read_text().splitlines() if "ERROR" in x or "died" in x]
    print("\n".join(errors[:4]), f"\nclient saw: {seen}", flush=True)
    with serve(model, projection) as server:
        print(f"restarted; same answer: {ask(server, model, 16) == before}", flush=True)


if __name__ == "__main__":
    kill_worker(*sys.argv[1:])
