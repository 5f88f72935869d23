# SPDX-License-Identifier: Apache-2.0
"""Windows are seeded, full, partly chats, and unusable data is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.calibration.conftest import byte_tokenizer
from vllm_kqsvd.calibration.corpus import CHAT_EVERY, Corpus, file_digest
from vllm_kqsvd.errors import CalibrationError


def test_windows_are_seeded_and_full(text_file: Path) -> None:
    a, b = (Corpus([text_file], byte_tokenizer(), 256, seed=1) for _ in range(2))
    other = Corpus([text_file], byte_tokenizer(), 256, seed=2)
    for i in range(10):
        assert len(a.window(i)) == 256
        assert a.window(i) == b.window(i)
    assert any(a.window(i) != other.window(i) for i in range(4))
    assert len({tuple(a.window(i)) for i in range(10)}) == 10


def test_some_windows_are_chats(text_file: Path) -> None:
    tokenizer = byte_tokenizer()
    corpus = Corpus([text_file], tokenizer, 256)
    assert tokenizer.decode(corpus.window(CHAT_EVERY - 1)).startswith("<s>user\n")
    assert "<s>user" not in tokenizer.decode(corpus.window(0))
    plain = Corpus([text_file], byte_tokenizer(chat=False), 256)
    assert "user\n" not in tokenizer.decode(plain.window(CHAT_EVERY - 1))[:20]


def test_jsonl_fields(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    rows = [
        {"text": "alpha " * 50},
        {"messages": [{"role": "user", "content": "beta " * 50}]},
        {"prompt": "gamma " * 50},
    ]
    path.write_text("\n".join(json.dumps(r) for r in rows * 4))
    text = byte_tokenizer().decode(Corpus([path], byte_tokenizer(), 1500).window(0))
    assert all(word in text for word in ("alpha", "beta", "gamma"))
    assert "{" not in text


def test_unusable_data_is_refused(tmp_path: Path, text_file: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("few words")
    with pytest.raises(CalibrationError, match="no calibration data"):
        Corpus([], byte_tokenizer())
    with pytest.raises(CalibrationError, match="does not exist"):
        Corpus([tmp_path / "absent.txt"], byte_tokenizer())
    with pytest.raises(CalibrationError, match="is not .txt"):
        Corpus([Path(__file__)], byte_tokenizer())
    with pytest.raises(CalibrationError, match="holds 9 tokens, a window needs 64"):
        Corpus([short], byte_tokenizer(), 64).window(0)
    assert len(file_digest(text_file)) == 64
