# SPDX-License-Identifier: Apache-2.0
"""Local data for lm-eval's tasks in benchmarks/lm_eval, from any text: long documents and passages with a last word.

    python -m benchmarks.lm_eval_documents TEXT... --tokenizer MODEL [--tokens 2048 ...] [--documents 6] [--passages 60]

Writes build/lm_eval/documents.jsonl and passages.jsonl, where the tasks look for them. Then, once per cache:

    lm_eval --model vllm --tasks kqsvd_last_word,kqsvd_long_document --include_path benchmarks/lm_eval \\
      --log_samples --output_path build/lm_eval/out/CACHE --model_args \\
      '{"pretrained": "MODEL", "attention_backend": "CUSTOM", "additional_config": {"kqsvd": {"projection": "DIR"}},
        "max_model_len": 2304, "max_num_batched_tokens": 64, "max_num_seqs": 4, "enable_prefix_caching": false}'

Steps of 64 tokens make every position read its past from the cache: a prompt in one step attends to itself exactly.
`python -m benchmarks.lm_eval_results build/lm_eval/out` then makes table rows of all caches.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer

FOLDER = Path("build/lm_eval")
PASSAGE_TOKENS = 512


def windows(ids: list[int], length: int, count: int) -> Iterator[list[int]]:
    """`count` windows of `length` tokens, evenly spread over a text."""
    if len(ids) < length:
        raise SystemExit(f"{len(ids)} tokens of text found, {length} needed; give a longer text")
    for i in range(count):
        start = (len(ids) - length) * i // max(count - 1, 1)
        yield ids[start : start + length]


def passage(text: str) -> dict[str, str] | None:
    """Cut `text` before the last word of six letters or more that it has twice; None if there is none."""
    for match in reversed(list(re.finditer(r"(?<= )[A-Za-z]{6,}", text))):
        if len(re.findall(rf"\b{match[0]}\b", text[: match.start()])) > 0 and match.start() > len(text) // 2:
            return {"context": text[: match.start()].rstrip(), "word": match[0]}
    return None


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048], help="of a document")
    parser.add_argument("--documents", type=int, default=6, help="of each text and length")
    parser.add_argument("--passages", type=int, default=60, help="of each text")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    documents, passages = [], []
    for path in args.texts:
        ids = tokenizer(path.read_text())["input_ids"]
        for n in args.tokens:
            documents += [{"text": tokenizer.decode(w), "tokens": n} for w in windows(ids, n, args.documents)]
        found = (passage(tokenizer.decode(w)) for w in windows(ids, PASSAGE_TOKENS, args.passages))
        passages += [p for p in found if p]
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, rows in (("documents", documents), ("passages", passages)):
        (FOLDER / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        print(f"{len(rows)} {name}")


if __name__ == "__main__":
    main()
