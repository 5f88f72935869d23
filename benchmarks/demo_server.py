# SPDX-License-Identifier: Apache-2.0
"""A `vllm serve` process for demo, benchmarks and tests: started, waited for, asked, looked at, stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

START_SECONDS = 600
OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """`vllm serve MODEL ARGUMENTS` on a local port (a free one if it is 0), as a context manager.

    Output goes to `log`; `environment` is added to this process's. Raises RuntimeError with the log's end if the
    server stops or is not ready in time.
    """

    process: subprocess.Popen[bytes]

    def __init__(
        self, model: Path, arguments: list[str], log: Path, port: int = 0, environment: Mapping[str, str] = OFFLINE
    ) -> None:
        self.log, self.port, self.environment = log, port or free_port(), environment
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
        self.command += ["--host", "127.0.0.1", "--port", str(self.port), *arguments]

    def start(self) -> None:
        """Start the process, without waiting for it."""
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
                start_new_session=True,  # so that the engine's processes can be found and stopped together
            )

    def __enter__(self) -> Server:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return answer.read().decode()

    def wait_ready(self) -> None:
        """Return once the server answers."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"vllm serve stopped with code {self.process.returncode}:\n{self.tail()}")
            try:
                self._get("/health")
                return
            except OSError:
                time.sleep(0.5)
        raise RuntimeError(f"vllm serve was not ready within {START_SECONDS} s:\n{self.tail()}")

    def tail(self, lines: int = 30) -> str:
        """The end of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self) -> None:
        """End it kindly, then for sure, with every process it started."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                pass
        for pid in self.members():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.wait()

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

    def post(self, body: dict[str, Any], seconds: float = 120) -> dict[str, Any]:
        """One completion."""
        request = urllib.request.Request(
            self.url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=seconds) as answer:
            return json.load(answer)

    def metrics(self) -> dict[str, float]:
        """Every metric on /metrics, summed over its labels."""
        found: dict[str, float] = {}
        for line in self._get("/metrics").splitlines():
            if not line.startswith("#"):
                name = re.split("[{ ]", line, maxsplit=1)[0]
                found[name] = found.get(name, 0.0) + float(line.rsplit(" ", 1)[1])
        return found

    def kv_tokens(self) -> int:
        """Tokens of KV cache that vLLM itself reports, over all cache groups."""
        found = re.search(r'vllm:cache_config_info\{[^}]*kv_cache_size_tokens="(\d+)"', self._get("/metrics"))
        if found is None:
            raise RuntimeError("this vLLM does not report kv_cache_size_tokens in /metrics")
        return int(found[1])

    def boot_report(self) -> str:
        """The plugin's block of the start-up log, without vLLM's line prefixes."""
        lines = self.log.read_text(errors="replace").splitlines()
        start = next((i for i, line in enumerate(lines) if "kqsvd: latent KV cache" in line), None)
        if start is None:
            raise RuntimeError("the server's log has no report of the plugin; see " + str(self.log))
        block = [re.sub(r"^.*?\] ", "", line) for line in lines[start : start + 12]]
        end = next((i for i, line in enumerate(block) if i and not line.startswith("  ")), len(block))
        return "\n".join(block[:end])
