# SPDX-License-Identifier: Apache-2.0
"""Calibration text: windows of tokens drawn by seed from local .txt and .jsonl files, some of them as chats."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vllm_kqsvd.errors import CalibrationError

CHAT_EVERY = 8  # one window in eight goes through the chat template: templates make sinks of their own
_BYTES_PER_TOKEN = 6  # first guess of the text needed for a window; doubled until it suffices


def file_digest(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class Corpus:
    """Seeded windows of exactly `window_length` token ids from local files.

    Window i depends on (files, tokenizer, seed, i) only, so runs can be cut, resumed and spread over machines.
    Raises CalibrationError if a file is missing, of another kind, or holds too little text.
    """

    def __init__(
        self, files: Iterable[str | Path], tokenizer: Any, window_length: int = 2048, seed: int = 0, chat: bool = True
    ) -> None:
        self.files = [Path(f) for f in files]
        if not self.files:
            raise CalibrationError("no calibration data given; name .txt or .jsonl files with --data")
        for f in self.files:
            if not f.is_file():
                raise CalibrationError(f"calibration file {f} does not exist")
            if f.suffix not in (".txt", ".md", ".jsonl"):
                raise CalibrationError(f"calibration file {f} is not .txt, .md or .jsonl")
        self.tokenizer, self.window_length, self.seed = tokenizer, window_length, seed
        self.chat = chat and getattr(tokenizer, "chat_template", None) is not None
        first = tokenizer("a").input_ids[:1]
        self._bos = first if first and first[0] == tokenizer.bos_token_id else []

    def describe(self) -> list[dict[str, object]]:
        """Name, size and digest of every file, for the projection file."""
        return [{"file": f.name, "bytes": f.stat().st_size, "sha256": file_digest(f)} for f in self.files]

    def window(self, index: int) -> list[int]:
        """Token ids of window `index`."""
        rng = random.Random(f"{self.seed}/{index}")
        path = self.files[index % len(self.files)]
        as_chat = self.chat and index % CHAT_EVERY == CHAT_EVERY - 1
        size = self.window_length * _BYTES_PER_TOKEN
        at = rng.random()
        while True:
            text, whole = _excerpt(path, at, size)
            ids = self._chat_ids(text, rng.randrange(2) == 1) if as_chat else self._bos + self._ids(text)
            if len(ids) >= self.window_length:
                return ids[: self.window_length]
            if whole:
                raise CalibrationError(
                    f"calibration file {path} holds {len(ids)} tokens, a window needs {self.window_length}; "
                    "give more text or a smaller --window-length"
                )
            size *= 2

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _chat_ids(self, text: str, short_turns: bool) -> list[int]:
        """The text as alternating user and assistant turns in the tokenizer's chat template."""
        turn = 300 if short_turns else 2000
        parts = [text[i : i + turn] for i in range(0, len(text), turn)] or [""]
        messages = [{"role": ("user", "assistant")[i % 2], "content": p} for i, p in enumerate(parts)]
        try:
            prompt = self.tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as e:  # templates are programs; any failure means this model has no usable one
            raise CalibrationError(f"the tokenizer's chat template failed: {e}; calibrate with --no-chat") from e
        return self._ids(prompt)


def _excerpt(path: Path, at: float, size: int) -> tuple[str, bool]:
    """About `size` bytes of text from relative place `at`, wrapping to the start; True if that is the whole file."""
    total = path.stat().st_size
    start = 0 if size >= total else int(at * (total - size))
    with path.open("rb") as f:
        f.seek(start)
        data = f.read(size)
    text = data.decode("utf-8", errors="ignore")
    if start:  # begin at a line, so that windows start as texts do
        text = text.partition("\n")[2] or text
    return (_jsonl_text(text) if path.suffix == ".jsonl" else text), size >= total


def _jsonl_text(lines: str) -> str:
    """The texts of JSON lines (fields text, content, prompt + completion, or messages), joined by blank lines."""
    out = []
    for line in lines.splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # cut lines at either end of an excerpt
        out.append(_record_text(record))
    return "\n\n".join(filter(None, out))


def _record_text(record: object) -> str:
    if isinstance(record, str):
        return record
    if isinstance(record, dict):
        if isinstance(messages := record.get("messages"), Sequence):
            return "\n".join(str(m.get("content", "")) for m in messages if isinstance(m, dict))
        return "\n".join(str(record[k]) for k in ("text", "content", "prompt", "completion", "response") if k in record)
    return ""
