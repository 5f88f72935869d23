# SPDX-License-Identifier: Apache-2.0
"""The load of `benchmarks.long_run`: clients that ask, stay or leave for some minutes, and a tally of what they got."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benchmarks.answers import Parted, Solo, body_of, compare, solo, streamed

if TYPE_CHECKING:
    import aiohttp

    from benchmarks.demo_server import Server

KINDS = {"fresh": 4, "prefix": 3, "known": 3, "leave": 2}  # kind of request -> how often
COMMON = 4096  # longest prompt of most clients; one more client asks for longer ones without pause
PREFIXES = 6
LAST_LONG = 0.1  # share of the time at whose end no long prompt begins any more
PATIENCE_SECONDS = 300  # beyond the time, on a slow machine
LINGER_SECONDS = 1200  # for answers after the end of the load


@dataclass(frozen=True)
class Load:
    """What is asked: clients at once, the longest sequence, answer lengths, ids of ordinary tokens or a text's."""

    clients: int
    longest: int
    answer: int
    vocab: int
    seed: int = 0
    text: tuple[int, ...] = ()

    def prompt(self, length: int, rng: random.Random) -> list[int]:
        """A piece of the text, or random tokens without the first ones, which are special in most models."""
        if self.text:
            begin = rng.randrange(len(self.text) - length + 1)
            return list(self.text[begin : begin + length])
        return [rng.randrange(3, self.vocab) for _ in range(length)]

    def length(self, rng: random.Random) -> int:
        """Of most prompts: 16 to COMMON tokens, every octave as often."""
        return min(int(16 * 2 ** (rng.random() * 8)), COMMON, self.longest - self.answer)

    def known_lengths(self) -> list[int]:
        """Of prompts whose answers are compared: from 16 tokens to half of the longest, evenly in octaves."""
        most = self.longest // 2 - self.answer
        found = [16]
        while found[-1] * 1.7 < most:
            found.append(int(found[-1] * 1.7))
        return [*found, most]


@dataclass
class Tally:
    """What the clients got."""

    finished: Counter[str] = field(default_factory=Counter)  # kind -> answers
    left: int = 0  # connections closed in mid-answer
    same: int = 0
    parted: list[tuple[int, Parted]] = field(default_factory=list)  # prompt length, where
    errors: list[str] = field(default_factory=list)
    tokens_in: int = 0
    longest: int = 0  # prompt that was answered

    @property
    def compared(self) -> int:
        """Answers beside their solo runs."""
        return self.same + len(self.parted)


Known = list[tuple[list[int], Solo]]


def solo_runs(server: Server, load: Load) -> Known:
    """Prompts of every length and what each answers while nothing else runs."""
    rng = random.Random(load.seed)
    prompts = [load.prompt(n, rng) for n in load.known_lengths()]
    return [(p, solo(server, p, load.answer, LINGER_SECONDS)) for p in prompts]


class Crowd:
    """The clients, who ask for `seconds` and until `enough()`.

    Every request has a fresh prompt, but for known prompts and shared beginnings.
    """

    def __init__(self, url: str, load: Load, known: Known, seconds: float, enough: Callable[[], bool]) -> None:
        self.url, self.load, self.known, self.enough = url, load, known, enough
        self.tally = Tally()
        self._seconds, self._end = seconds, time.monotonic() + seconds
        rng = random.Random(load.seed + 1)
        self._prefixes = [load.prompt(min(rng.randint(256, 2048), load.longest // 4), rng) for _ in range(PREFIXES)]

    async def run(self) -> Tally:
        """All clients until the time is over, and their last answers."""
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=LINGER_SECONDS)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            await asyncio.gather(
                self._long_client(session), *(self._client(session, n) for n in range(self.load.clients))
            )
        return self.tally

    def _more(self) -> bool:
        """Whether the time is not over, or the server has not yet done all it is meant to (within reason)."""
        now = time.monotonic()
        return now < self._end or (now < self._end + PATIENCE_SECONDS and not self.enough())

    async def _client(self, session: aiohttp.ClientSession, number: int) -> None:
        rng = random.Random(1000 * self.load.seed + number)
        common = [k for k in self.known if len(k[0]) <= COMMON]
        while self._more():
            kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
            if kind == "known":
                await self._ask(session, kind, *rng.choice(common))
                continue
            prompt = self.load.prompt(self.load.length(rng), rng)
            if kind == "prefix":
                prompt = [*rng.choice(self._prefixes), *prompt[:256]]
            if kind == "leave":
                await self._leave(session, prompt, rng)
            else:
                await self._ask(session, kind, prompt)

    async def _long_client(self, session: aiohttp.ClientSession) -> None:
        """Long prompts one after another: fresh ones of the longest length, a half, a quarter; known ones between."""
        rng = random.Random(1000 * self.load.seed - 1)
        known = [k for k in self.known if len(k[0]) > COMMON] or self.known[-1:]
        most, rounds = self.load.longest - self.load.answer, 0
        while time.monotonic() < self._end - LAST_LONG * self._seconds:
            if rounds % 2:
                await self._ask(session, "long known", *known[-1 - rounds // 2 % len(known)])
            else:
                await self._ask(session, "long", self.load.prompt(most >> rounds // 2 % 3, rng))
            rounds += 1

    async def _ask(
        self, session: aiohttp.ClientSession, kind: str, prompt: list[int], alone: Solo | None = None
    ) -> None:
        """A request that stays to the end; with `alone` its answer is compared."""
        tally = self.tally
        try:
            got = await streamed(session, self.url, body_of(prompt, self.load.answer))
        except (TimeoutError, RuntimeError, OSError) as e:
            tally.errors.append(f"{kind}, {len(prompt)} tokens: {type(e).__name__}: {e}")
            await asyncio.sleep(1)
            return
        tally.finished[kind] += 1
        tally.tokens_in += len(prompt)
        tally.longest = max(tally.longest, len(prompt))
        if alone is not None:
            parted = compare(alone, got)
            if parted is None:
                tally.same += 1
            else:
                tally.parted.append((len(prompt), parted))

    async def _leave(self, session: aiohttp.ClientSession, prompt: list[int], rng: random.Random) -> None:
        """A request whose client leaves: after some tokens, or before the first one."""
        body = body_of(prompt, 4 * self.load.answer)
        answer = streamed(session, self.url, body, rng.randint(1, self.load.answer))
        try:
            await asyncio.wait_for(answer, rng.uniform(0.1, 1.0) if rng.random() < 0.3 else None)
        except TimeoutError:
            pass
        except (RuntimeError, OSError) as e:
            self.tally.errors.append(f"leave, {len(prompt)} tokens: {type(e).__name__}: {e}")
            await asyncio.sleep(1)
            return
        self.tally.left += 1
