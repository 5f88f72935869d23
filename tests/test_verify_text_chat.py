# SPDX-License-Identifier: Apache-2.0
"""Held-out windows in a chat template."""

from __future__ import annotations

import pytest

from tests.attention.models import write_tokenizer
from vllm_kqsvd.errors import ConfigError
from vllm_kqsvd.verify_text import TURN_CHARACTERS, text_windows


def test_chat_windows_start_with_the_template(tmp_path):
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = (
        "{% for m in messages %}w{{ 7 if m['role'] == 'user' else 9 }} {{ m['content'] }} {% endfor %}"
    )
    text = "w3 " * 4000
    windows = text_windows(text, "t", tokenizer, 1024, 2, 64, chat=True)
    assert [w.tokens.numel() for w in windows] == [1024, 1024]
    assert windows[0].first_scored == 960
    marks = (windows[0].tokens == 9).nonzero()[0, 0]
    assert int(windows[0].tokens[0]) == 7
    assert abs(int(marks) - TURN_CHARACTERS // 3) <= 2
    with pytest.raises(ConfigError, match="too short"):
        text_windows(text, "t", tokenizer, 8192, 2, 64, chat=True)
