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

PORT = 18765
LOG = Path("kill_worker.log")


def ask(model: str, tokens: int, timeout: float) -> str:
    """A greedy completion."""
    body = {"model": model, "prompt": "One, two, three,", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return json.loads(urllib.request.urlopen(request, timeout=timeout).read())["choices"][0]["text"]


def start(model: str, projection: str) -> tuple[subprocess.Popen, float]:
    """A TP 2 server and the seconds it took to answer."""
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.cli.main",
        "serve",
        model,
        "--tensor-parallel-size",
        "2",
        "--port",
        str(PORT),
        "--max-model-len",
        "2048",
    ]
    command += ["--gpu-memory-utilization", "0.3", "--attention-backend", "CUSTOM", "--enforce-eager"]
    command += ["--additional-config", json.dumps({"kqsvd": {"projection": projection}})]
    server = subprocess.Popen(command, stdout=LOG.open("w"), stderr=subprocess.STDOUT)
    begin = time.perf_counter()
    while time.perf_counter() - begin < 180 and server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=2)
            break
        except OSError:
            time.sleep(1)
    return server, time.perf_counter() - begin


def kill_worker(model: str, projection: str) -> None:
    """Print what happens."""
    server, seconds = start(model, projection)
    before = ask(model, 16, 60)
    print(f"server up after {seconds:.0f} s, answers {before!r}", flush=True)
    seen: list[str] = []

    def long_request() -> None:
        try:
            ask(model, 1900, 60)
            seen.append("an answer")
        except (OSError, ValueError) as error:
            seen.append(f"{type(error).__name__}: {error}")

    client = threading.Thread(target=long_request)
    client.start()
    time.sleep(2)
    listing = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout
    workers = [int(x.split()[0]) for x in listing.splitlines() if "VLLM::Worker" in x]
    print(f"workers {workers}; killing the last", flush=True)
    os.kill(workers[-1], signal.SIGKILL)
    begin = time.perf_counter()
    try:
        code = server.wait(60)
    except subprocess.TimeoutExpired:
        code = None
        server.kill()
    print(f"server ended with {code} after {time.perf_counter() - begin:.1f} s", flush=True)
    client.join(70)
    errors = [x for x in LOG.read_text().splitlines() if "ERROR" in x or "died" in x]
    print("\n".join(errors[:4]), f"\nclient saw: {seen}", flush=True)
    time.sleep(3)
    server, seconds = start(model, projection)
    print(f"restarted in {seconds:.0f} s; same answer: {ask(model, 16, 60) == before}", flush=True)
    server.terminate()
    server.wait(30)


if __name__ == "__main__":
    kill_worker(*sys.argv[1:])
