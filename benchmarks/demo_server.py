# SPDX-License-Identifier: Apache-2.0
"""A `vllm serve` process for the demo and the benchmarks: started, waited for, asked for its own numbers, stopped."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType

START_SECONDS = 600


class Server:
    """`vllm serve MODEL ARGUMENTS` on a free local port, as a context manager.

    Output goes to `log`. Raises RuntimeError with the log's end if the server stops or is not ready in time.
    """

    def __init__(self, model: Path, arguments: list[str], log: Path) -> None:
        self.log = log
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
        self.command += ["--host", "127.0.0.1", "--port", str(self.port), *arguments]

    def __enter__(self) -> Server:
        offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | offline,
                start_new_session=True,  # so that the engine's processes can be stopped together
            )
        try:
            self._wait()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop()

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return answer.read().decode()

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"vllm serve stopped with code {self.process.returncode}:\n{self._tail()}")
            try:
                self._get("/health")
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise RuntimeError(f"vllm serve was not ready within {START_SECONDS} s:\n{self._tail()}")

    def _tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])

    def _stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                pass
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()

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
