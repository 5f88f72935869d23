# SPDX-License-Identifier: Apache-2.0
"""The OpenAI server with the plugin: completion, chat, streaming, a client that leaves in mid-stream, /metrics."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm")
openai = pytest.importorskip("openai")

READY_SECONDS = 300


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """(base URL, log) of a server whose projection lies beside the model's config."""
    model, port = tiny / "model", free_port()
    beside = model / "kqsvd"
    if not beside.exists():
        beside.symlink_to(tiny / "p8")
    log = tmp_path_factory.mktemp("serve") / "server.log"
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
        "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port),
        "--attention-backend", "CUSTOM", "--enforce-eager", "--dtype", "float32",
        "--max-model-len", "512", "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(8 << 20),
    ]  # fmt: skip
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True)
    try:
        end = time.monotonic() + READY_SECONDS
        while not healthy(port):
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1", log
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def healthy(port: int) -> bool:
    """Whether the server answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


def test_boot_report(server: tuple[str, Path]) -> None:
    text = server[1].read_text()
    report = ("kqsvd: latent KV cache", "3 of 3 attention layers", "KV tokens", "rope mode   page", "kernels     cpu")
    for words in report:
        assert words in text


def test_chat_streaming_and_departure(server: tuple[str, Path]) -> None:
    client = openai.OpenAI(base_url=server[0], api_key="none")
    message = [{"role": "user", "content": " ".join(f"w{3 + n}" for n in range(200))}]
    options = {"model": "tiny", "messages": message, "temperature": 0, "max_tokens": 16}
    whole = client.chat.completions.create(**options).choices[0].message.content
    parts = client.chat.completions.create(**options, stream=True)
    streamed = "".join(p.choices[0].delta.content or "" for p in parts)
    assert whole and streamed == whole
    leaving = client.chat.completions.create(**{**options, "max_tokens": 200}, stream=True)
    next(iter(leaving))
    leaving.close()
    prompt = [5, 6, 7]
    answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=4, temperature=0)
    assert answer.usage.completion_tokens <= 4 and answer.choices[0].text


def scrape(server: tuple[str, Path]) -> dict[str, float]:
    """Samples of /metrics: name with labels -> value."""
    with urllib.request.urlopen(server[0].removesuffix("/v1") + "/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (x.rsplit(" ", 1) for x in lines if not x.startswith("#"))}


def test_metrics_of_the_workers_reach_the_front_end(server: tuple[str, Path]) -> None:
    samples = scrape(server)
    ours = {k.split(":")[1].replace(',model_name="tiny"', ""): v for k, v in samples.items() if "vllm_kqsvd:" in k}
    one = '{engine="0"}'
    assert ours["kv_bytes_per_token" + one] == 780 and ours["kv_bytes_per_token_uncompressed" + one] == 3072
    assert ours['layers{engine="0",kernels="cpu",mode="page"}'] == ours["ranks" + one] + 2 == 3
    assert ours['self_test_layers{engine="0",result="passed"}'] == 3 and 0 < ours["self_test_error_max" + one] < 0.02
    assert ours["nan_guard_trips" + one] == 0
    told = re.search(r'kv_cache_size_tokens="(\d+)"', next(k for k in samples if "cache_config_info" in k))
    assert told and ours["kv_tokens" + one] == int(told[1])
    assert ours["kv_tokens_gained" + one] == ours["kv_tokens" + one] - ours["kv_tokens_uncompressed" + one] > 0
    assert ours["compression_ratio" + one] == ours["kv_tokens" + one] / ours["kv_tokens_uncompressed" + one]


def test_window_fill_follows_the_running_requests(server: tuple[str, Path]) -> None:
    name = 'vllm_kqsvd:window_fill{engine="0",model_name="tiny"}'
    client = openai.OpenAI(base_url=server[0], api_key="none")
    parts = iter(client.completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=400, stream=True))
    next(parts)
    assert 0 < scrape(server)[name] < 1
    for _ in parts:
        pass
    assert scrape(server)[name] == 0


def test_every_query_of_the_dashboard_finds_its_metric(server: tuple[str, Path]) -> None:
    known = {re.split("[{ ]", name)[0] for name in scrape(server)}
    labels = {label for name in scrape(server) for label in re.findall(r'(\w+)="', name)}
    board = json.loads((Path(__file__).parents[2] / "dashboards" / "kqsvd.json").read_text())
    queries = [t["expr"] for p in board["panels"] for t in p["targets"]]
    queries += [v["definition"] for v in board["templating"]["list"]]
    assert len(queries) > 20
    for query in queries:
        names = re.findall(r"\bvllm(?:_kqsvd)?:\w+", query)
        assert names and set(names) <= known, query
        assert set(re.findall(r'(\w+)=~?"', query)) <= labels, query
    from vllm_kqsvd.metrics import GAUGES, PREFIX

    assert {PREFIX + name for name in GAUGES} <= known
