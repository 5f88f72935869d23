# SPDX-License-Identifier: Apache-2.0
"""Held-out text for `verify`: from files to windows of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from vllm_kqsvd.errors import ConfigError
from vllm_kqsvd.verify_harness import Window

CHARACTERS_PER_TOKEN = 12  # generous: a window is tokenized from so many characters per token
TURN_CHARACTERS = 2000  # of a message, where a text is put into a chat template


def read_text(path: Path) -> str:
    """The UTF-8 text of a file (undecodable bytes replaced). Raises ConfigError where there is none."""
    try:
        text = path.read_text(errors="replace")
    except OSError as e:
        raise ConfigError(f"cannot read held-out text {path}: {e.strerror}; give --data text files") from e
    if not text.strip():
        raise ConfigError(f"held-out text {path} is empty; give --data files with text")
    return text


def text_windows(
    text: str, name: str, tokenizer, context: int, count: int, scored: int, chat: bool = False
) -> list[Window]:
    """`count` windows of `context` tokens at evenly spread line starts; the last `scored` of each are predicted.

    The tokenizer's own leading special tokens (a BOS where the model has one) open every window. `chat`: the text as
    alternating turns of user and assistant in the tokenizer's chat template instead. Raises ConfigError if the text is
    too short for windows that do not overlap.
    """
    if not 0 < scored < context:
        raise ConfigError(f"{scored} scored tokens of {context} asked for; score fewer than the context")
    if chat:
        return _chat_windows(text, name, tokenizer, context, count, scored)
    opening = list(tokenizer("").input_ids)
    windows, free = [], 0
    for i in range(count):
        start = max(free, len(text) * i // count + len(text) // (4 * count))
        start = max(free, text.find("\n", start) + 1) if count > 1 or start else 0
        piece = text[start : start + CHARACTERS_PER_TOKEN * context]
        coded = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
        need = context - len(opening)
        if len(coded.input_ids) < need:
            coded, start = _last(text, free, tokenizer, need, name)
        ids = opening + list(coded.input_ids[:need])
        free = start + coded.offset_mapping[need - 1][1]
        windows.append(Window(torch.tensor(ids), name, context - scored))
    return windows


def _chat_windows(text: str, name: str, tokenizer, context: int, count: int, scored: int) -> list[Window]:
    """Windows of equal parts of the text, each in the chat template from its beginning."""
    windows = []
    for i in range(count):
        part = text[len(text) * i // count : len(text) * (i + 1) // count][: CHARACTERS_PER_TOKEN * context]
        turns = [part[at : at + TURN_CHARACTERS] for at in range(0, len(part), TURN_CHARACTERS)]
        messages = [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = list(tokenizer(prompt, add_special_tokens=False).input_ids)
        if len(ids) < context:
            raise ConfigError(
                f"text {name} is too short: {len(ids)} tokens as a chat for a window of {context}; "
                "give a longer --data file, a smaller --context or fewer --windows"
            )
        windows.append(Window(torch.tensor(ids[:context]), name, context - scored))
    return windows


def _last(text: str, free: int, tokenizer, need: int, name: str):
    """The last `need` tokens' worth of text after `free`, for a window that would run over the end."""
    coded = tokenizer(text[free:], add_special_tokens=False, return_offsets_mapping=True)
    if len(coded.input_ids) < need:
        raise ConfigError(
            f"text {name} is too short: {len(coded.input_ids)} tokens left for a window of {need}; "
            "give a longer --data file, a smaller --context or fewer --windows"
        )
    start = free + coded.offset_mapping[len(coded.input_ids) - need][0]
    return tokenizer(text[start:], add_special_tokens=False, return_offsets_mapping=True), start


def file_digests(paths: Sequence[Path]) -> dict[str, Path]:
    """sha256 of every file, to tell held-out text from calibration text."""
    return {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in paths}
