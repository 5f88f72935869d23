# SPDX-License-Identifier: Apache-2.0
"""Projection folders whose text was written by an enemy: values, names and sizes no calibrator writes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from safetensors.torch import load

from tests.reliability import LONG, sized
from tests.reliability.folders import CONFIG, HOSTILE, TENSORS, header_end, outcome, paths, put, rewrite, with_table


def text_of(value: object) -> str | None:
    """JSON of a value; None where Python cannot write it."""
    try:
        return json.dumps(value)
    except ValueError:  # an integer of more than 4300 digits
        return None


def test_hostile_values_anywhere_in_the_json(good: Path, victim: Path) -> None:
    rng = random.Random(3)
    source, tensors = (good / CONFIG).read_text(), load((good / TENSORS).read_bytes())
    every = [(place, value) for place in paths(json.loads(source)) for value in (*HOSTILE, ...)]
    cases = every if LONG else rng.sample(every, 400)
    refused = 0
    for place, value in cases:
        data = json.loads(source)
        put(data, place, value)
        rewrite(victim, data, tensors)
        refused += bool(outcome(victim))
    assert refused > len(cases) // 2  # `calibration` may hold anything


def test_hostile_names_anywhere_in_the_json(good: Path, victim: Path) -> None:
    rng = random.Random(7)
    source, tensors = (good / CONFIG).read_text(), load((good / TENSORS).read_bytes())
    for _ in range(sized(100, 2000)):
        data = json.loads(source)
        place = rng.choice([p for p in paths(data) if isinstance(p[-1], str)])
        parent = data
        for key in place[:-1]:
            parent = parent[key]
        parent[rng.choice([v for v in HOSTILE if isinstance(v, str)])] = parent.pop(place[-1])
        rewrite(victim, data, tensors)
        assert outcome(victim) or place[0] in ("calibration", "digest") or "parameters" in place


def test_hostile_values_anywhere_in_the_tensor_table(good: Path, victim: Path) -> None:
    rng, content = random.Random(4), (good / TENSORS).read_bytes()
    source = content[8 : header_end(content)]
    table = json.loads(source)
    every = [(p, v) for p in paths(table) if p[0] != "__metadata__" for v in (*HOSTILE, ...)]
    for place, value in every if LONG else rng.sample(every, 300):
        data = json.loads(source)
        put(data, place, value)
        if text := text_of(data):
            (victim / TENSORS).write_bytes(with_table(content, text))
            assert outcome(victim) or data == table


def test_duplicate_keys_anywhere(good: Path, victim: Path) -> None:
    """Readers differ in which of two equal keys they believe, so none may pass."""
    content = (good / TENSORS).read_bytes()
    table = json.loads(content[8 : header_end(content)])
    inner = table["__metadata__"]["kqsvd"]
    places = [i for i, c in enumerate(inner) if c == "{" and inner[i + 1] == '"']
    for at in places:
        key = inner[at + 1 : inner.index(":", at)]
        table["__metadata__"]["kqsvd"] = f"{inner[: at + 1]}{key}:0,{inner[at + 1 :]}"
        (victim / TENSORS).write_bytes(with_table(content, json.dumps(table)))
        assert "duplicate keys" in outcome(victim)
    table["__metadata__"]["kqsvd"] = inner
    text = json.dumps(table)
    for name in list(table):
        (victim / TENSORS).write_bytes(with_table(content, f"{{{json.dumps(name)}:{{}},{text[1:]}"))
        assert "duplicate keys" in outcome(victim)


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe", b"\xef\xbb\xbf{}", b"[" * 100000, b'{"a":' * 50000, b"1" * 5000,
        b'{"format":"kqsvd"}', b'{"format":"kqsvd","schema_version":1,"model":{}}', b'{"a":1,"a":2}', b'{"a":NaN}',
        b'{"a":-Infinity}', b'{"x":"\\ud800"}', b'{"a":' + b"9" * 5000 + b"}", b'{"\\u0000":1}', b"{'a':1}",
        b'{"__metadata__":{"kqsvd":"{}"}}', b'{"__metadata__":{"kqsvd":1}}', b'{"__metadata__":[]}',
        b'{"__metadata__":{"kqsvd":"' + b"[" * 90000 + b'"}}', b'{"__metadata__":{"kqsvd":"{\\"a\\":1e999}"}}',
        b'{"__metadata__":{"kqsvd":"{\\"a\\":' + b"[" * 40 + b"]" * 40 + b'}"}}', b"[" + b"{}," * 500000 + b"{}]",
    ],
)  # fmt: skip
def test_hostile_headers(victim: Path, text: bytes) -> None:
    (victim / TENSORS).write_bytes(len(text).to_bytes(8, "little") + text)
    assert outcome(victim)


@pytest.mark.parametrize("place", ["calibration", "header"])
def test_nesting_is_limited(good: Path, victim: Path, place: str) -> None:
    data, tensors = json.loads((good / CONFIG).read_text()), load((good / TENSORS).read_bytes())
    for depth in (40, 400, 900):
        value: object = 0
        for _ in range(depth):
            value = [value]
        rewrite(victim, data | ({"calibration": {"x": value}} if place == "calibration" else {"x": value}), tensors)
        assert "nested deeper than 32" in outcome(victim)


def test_other_versions_are_refused_naming_both(good: Path, victim: Path) -> None:
    data, tensors = json.loads((good / CONFIG).read_text()), load((good / TENSORS).read_bytes())
    for version in (0, 2, "1", None, "1\n\x1b[2J"):
        rewrite(victim, data | {"schema_version": version}, tensors)
        assert f"schema version {version!r}, this vllm_kqsvd reads version 1" in outcome(victim)
    rewrite(victim, data | {"format": "gguf"}, tensors)
    assert "'gguf' found, 'kqsvd' expected" in outcome(victim)


def test_missing_layer(good: Path, victim: Path) -> None:
    data, tensors = json.loads((good / CONFIG).read_text()), load((good / TENSORS).read_bytes())
    rewrite(victim, data | {"layers": data["layers"][:2], "predicted": []}, tensors)
    assert "tensor" in outcome(victim)  # those of a layer nobody declares
    rewrite(victim, data | {"layers": data["layers"][1:] + data["layers"][:1]}, tensors)
    assert "out of order" in outcome(victim)
