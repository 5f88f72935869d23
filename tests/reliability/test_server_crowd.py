# SPDX-License-Identifier: Apache-2.0
"""A crowd at a real server: no answer is lost or another's, no block leaks, and a replaced projection changes nothing.

Greedy answers may differ from the solo run where two tokens are nearly equal: the size of a batch changes the order of
sums in the model's matrix products (vLLM is not batch invariant), and 8-bit codes turn a rounding into a step. Such a
step must have taken a token that is less than NEAR behind the solo run's best.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm")
aiohttp = pytest.importorskip("aiohttp")

from benchmarks import answers  # noqa: E402
from benchmarks.answers import Solo, body_of, solo  # noqa: E402
from tests.attention.models import write_model, write_projection  # noqa: E402
from tests.attention.runs import prompt_of  # noqa: E402
from tests.reliability import sized  # noqa: E402
from tests.reliability.server import Server, assert_dies_clearly  # noqa: E402
from vllm_kqsvd.projection import load_projection  # noqa: E402

NEAR = 0.05  # log probability
REQUESTS, STREAMS, AT_ONCE = sized(400, 10_000), sized(40, 200), 64
SHORT_TOKENS, STREAM_TOKENS = 8, 64
turned: list[float] = []  # how far behind the best token that was, which an answer took instead


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model` with two layers, and projections `p` (served) and `other`."""
    folder = tmp_path_factory.mktemp("crowd")
    model = write_model(folder / "model", num_hidden_layers=2)
    write_projection(folder / "p", model, 8, layers=2)
    write_projection(folder / "other", model, 4, layers=2)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """The server, ready."""
    running = Server(folder / "model", folder / "p", folder / "server.log")
    try:
        running.wait_ready()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def known(server: Server) -> list[tuple[list[int], Solo]]:
    """Prompts, one in eight longer than the exact window, and what each answers alone."""
    rng = random.Random(5)
    lengths = [rng.randint(80, 300) if n % 8 == 7 else rng.randint(1, 40) for n in range(sized(40, 400))]
    prompts = [prompt_of(length, seed=n) for n, length in enumerate(lengths)]
    return [(p, solo(server, p, STREAM_TOKENS if n % 4 == 3 else SHORT_TOKENS)) for n, p in enumerate(prompts)]


def compare(alone: Solo, got: list[int]) -> str:
    """ "same", "near" (parts where two tokens are nearly equal) or a complaint."""
    parted = answers.compare(alone, got)
    if parted is None:
        return "same"
    if parted.behind < NEAR:
        turned.append(parted.behind)
        return "near"
    return f"step {parted.step}: a token {parted.behind:.3f} behind the best"


async def complete(session: aiohttp.ClientSession, url: str, prompt: list[int], alone: Solo) -> str:
    """One whole answer."""
    async with session.post(url + "/v1/completions", json=body_of(prompt, SHORT_TOKENS)) as answer:
        if answer.status != 200:
            return f"status {answer.status}: {(await answer.text())[:200]}"
        data = await answer.json()
    (choice,) = data["choices"]
    if len(choice["token_ids"]) != SHORT_TOKENS or choice["finish_reason"] != "length":
        return f"{len(choice['token_ids'])} tokens, {choice['finish_reason']}"
    return compare(alone, choice["token_ids"])


async def stream(session: aiohttp.ClientSession, url: str, prompt: list[int], alone: Solo, leave: bool) -> str:
    """One answer token by token; `leave` closes the connection in the middle of it."""
    body, half = body_of(prompt, len(alone.tokens)), len(alone.tokens) // 2
    try:
        return compare(alone, await answers.streamed(session, url, body, half if leave else None))
    except RuntimeError as e:
        return str(e)


async def crowd(server: Server, known: list[tuple[list[int], Solo]], middle: asyncio.Future[None]) -> Counter[str]:
    """All requests, AT_ONCE at a time, beside all streams at once."""
    url = server.url
    rng, results = random.Random(9), Counter[str]()
    gate = asyncio.Semaphore(AT_ONCE)
    long = [k for k in known if len(k[1].tokens) == STREAM_TOKENS]

    async def one(session: aiohttp.ClientSession, n: int) -> None:
        async with gate:
            if n == REQUESTS // 2:
                middle.set_result(None)
            results["request " + await complete(session, url, *rng.choice(known))] += 1

    async def all_streams(session: aiohttp.ClientSession, n: int) -> None:
        leave = n % 20 == 19
        found = await stream(session, url, *rng.choice(long), leave)
        results[("left " if leave else "stream ") + found] += 1

    timeout = aiohttp.ClientTimeout(total=3600)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(
            *(all_streams(session, n) for n in range(STREAMS)), *(one(session, n) for n in range(REQUESTS))
        )
    return results


async def crowd_and_replace(server: Server, known: list[tuple[list[int], Solo]], folder: Path) -> Counter[str]:
    """The crowd; in the middle of it the served projection is replaced."""
    middle = asyncio.get_running_loop().create_future()

    async def replace() -> None:
        await middle
        from vllm_kqsvd.projection import save_projection

        await asyncio.to_thread(save_projection, load_projection(folder / "other"), folder / "p")

    results, _ = await asyncio.gather(crowd(server, known, middle), replace())
    return results


def test_a_crowd_gets_its_own_answers(server: Server, known: list[tuple[list[int], Solo]], folder: Path) -> None:
    served = load_projection(folder / "p").digest
    began = time.monotonic()
    results = asyncio.run(crowd_and_replace(server, known, folder))
    seconds = time.monotonic() - began
    print(
        f"{REQUESTS} requests and {STREAMS} streams in {seconds:.0f} s, {REQUESTS / seconds:.1f} requests/s; "
        f"{results}; furthest turn {max(turned, default=0.0):.4f}"
    )
    good = {f"{kind} {how}" for kind in ("request", "stream", "left") for how in ("same", "near")}
    assert set(results) <= good, results
    assert sum(n for k, n in results.items() if k.startswith("request")) == REQUESTS
    assert sum(n for k, n in results.items() if not k.startswith("request")) == STREAMS
    assert sum(n for k, n in results.items() if k.endswith("near")) <= (REQUESTS + STREAMS) // 20
    assert served[:16] in server.log.read_text()
    assert load_projection(folder / "p").digest != served


def test_the_projection_is_read_once(server: Server, known: list[tuple[list[int], Solo]]) -> None:
    """After the replacement, and alone again, the answers are those of the projection in the boot report."""
    for prompt, alone in known[:8]:
        assert compare(alone, solo(server, prompt, len(alone.tokens)).tokens) in ("same", "near")


def test_nothing_is_left_of_the_crowd(server: Server) -> None:
    end = time.monotonic() + 60
    while server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting"):
        assert time.monotonic() < end
        time.sleep(0.5)
    assert server.metric("vllm:kv_cache_usage_perc") == 0
    assert "Traceback" not in server.log.read_text(), server.tail()


def test_a_killed_engine_ends_the_server(server: Server) -> None:
    assert_dies_clearly(server, "EngineCore")
