# SPDX-License-Identifier: Apache-2.0
"""The tokenizer inside a GGUF file, written as Hugging Face `tokenizer.json`.

Only the two byte-level BPE families of the models in `models.py`; any other pre-tokenizer is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

Field = Callable[[str], Any]

# Token types of GGUF's `tokenizer.ggml.token_type`.
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
SPECIAL_TYPES = (2, CONTROL, USER_DEFINED)

# How Qwen2 cuts text before BPE: contractions, words, single digits, punctuation, line ends, blanks.
QWEN2_SPLIT = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def _cut_smollm(tokenizer: Tokenizer) -> None:
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )


def _cut_qwen2(tokenizer: Tokenizer) -> None:
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated")
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


CUTTERS = {"smollm": _cut_smollm, "qwen2": _cut_qwen2}


def build_tokenizer(field: Field) -> Tokenizer:
    """The fast tokenizer described by the GGUF header; `field` reads one `tokenizer.ggml.*` entry.

    Raises ValueError for a pre-tokenizer not listed in CUTTERS, or if a special token would change its id.
    """
    family, tokens, types = field("pre"), field("tokens"), field("token_type")
    if family not in CUTTERS:
        raise ValueError(f"GGUF pre-tokenizer {family!r} is unknown; known are {sorted(CUTTERS)}")
    # Qwen2 keeps its special tokens outside the BPE vocabulary, SmolLM inside.
    in_vocab = (NORMAL,) if family == "qwen2" else (NORMAL, *SPECIAL_TYPES)
    vocab = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind in in_vocab}
    merges = [tuple(merge.split(" ")) for merge in field("merges")]
    tokenizer = Tokenizer(BPE(vocab, merges, fuse_unk=False, byte_fallback=False))
    CUTTERS[family](tokenizer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind not in SPECIAL_TYPES:
            continue
        added = AddedToken(token, special=kind == CONTROL, normalized=False)
        (tokenizer.add_special_tokens if kind == CONTROL else tokenizer.add_tokens)([added])
        if tokenizer.token_to_id(token) != i:
            raise ValueError(f"special token {token!r} got id {tokenizer.token_to_id(token)}, the file says {i}")
    return tokenizer


def write_tokenizer(field: Field, chat_template: str, folder: Path, context_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into `folder`."""
    build_tokenizer(field).save(str(folder / "tokenizer.json"))
    tokens, qwen2 = field("tokens"), field("pre") == "qwen2"

    def named(role: str) -> str:
        return tokens[field(f"{role}_token_id")]

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "bos_token": None if qwen2 else named("bos"),
        "eos_token": named("eos"),
        "pad_token": named("padding"),
        "unk_token": None if qwen2 else named("unknown"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(chat_template)
