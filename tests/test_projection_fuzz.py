# SPDX-License-Identifier: Apache-2.0
"""Damaged and hostile projection folders: one clear error, never a crash, never much memory or time.

KQSVD_FUZZ_CASES sets the number of random cases of each kind (default 60).
"""

from __future__ import annotations

import json
import os
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file

from tests.projections import tiny_projection
from vllm_kqsvd.errors import ProjectionFileError
from vllm_kqsvd.projection import load_projection, save_projection
from vllm_kqsvd.projection_read import digest_of

CASES = int(os.environ.get("KQSVD_FUZZ_CASES", "60"))
TENSORS, CONFIG = "kqsvd.safetensors", "kqsvd_config.json"
HOSTILE = (
    None, True, -1, 0, 1, 3, 10**9, 10**30, 2**63, -(2**63), 0.5, 1e308, "", "x", "../../etc/passwd", "\x00", "\ud800",
    "a" * 5000, [], [[]], [None], [[4, [0]]], [[2, [0, 0]]], [[8, [63]]], {}, {"": {}}, [[1e9, [1e9]]], "NaN",
)  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid folder, never changed."""
    folder = tmp_path_factory.mktemp("good") / "p"
    save_projection(tiny_projection(), folder)
    return folder


@pytest.fixture
def victim(good: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    for name in (TENSORS, CONFIG):
        (tmp_path / name).write_bytes((good / name).read_bytes())
    return tmp_path


def outcome(folder: Path) -> str:
    """ "" if the folder is read as a sound projection, else the text of its one error."""
    started = time.monotonic()
    try:
        projection = load_projection(folder)
    except ProjectionFileError as e:
        text = str(e)
        assert "\n" not in text and len(text) < 1000 and str(folder) in text
        assert time.monotonic() - started < 5
        return text
    assert len(projection.layers) == projection.model.num_layers
    for entry in projection.layers.values():
        for side in (entry.codec.k, entry.codec.v):
            assert all(torch.isfinite(x).all() for x in (side.encode, side.decode, side.mean, side.sink))
    return ""


def rewrite(folder: Path, data: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Write both files with a digest that is right, so that only the content can be refused."""
    try:
        data = data | {"digest": digest_of(tensors, data)}
    except ProjectionFileError:
        pass
    text = json.dumps(data)
    save_file(tensors, folder / TENSORS, {"kqsvd": text})
    (folder / CONFIG).write_text(text)


def paths(data: Any, at: tuple = ()) -> list[tuple]:
    """Every place in a JSON value."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [at] * bool(at) + [p for k, v in inner for p in paths(v, (*at, k))]


def put(data: Any, path: tuple, value: Any) -> None:
    """Set, or with `...` delete, one place."""
    for key in path[:-1]:
        data = data[key]
    if value is ...:
        del data[path[-1]]
    else:
        data[path[-1]] = value


def test_flipped_bits(good: Path, victim: Path) -> None:
    rng, before = random.Random(1), load_projection(good).digest
    for name in (TENSORS, CONFIG):
        content = (good / name).read_bytes()
        header = 8 + int.from_bytes(content[:8], "little") if name == TENSORS else len(content)
        for case in range(CASES):
            broken = bytearray(content)
            at = rng.randrange(header if case % 2 else len(content))
            broken[at] ^= 1 << rng.randrange(8)
            (victim / name).write_bytes(broken)
            if not outcome(victim):  # a flip may turn one blank into another
                assert load_projection(victim).digest == before and content[at : at + 1].isspace()
        (victim / name).write_bytes(content)


def test_every_length_of_truncation_and_extension(good: Path, victim: Path) -> None:
    rng, content = random.Random(2), (good / TENSORS).read_bytes()
    lengths = [0, 1, 7, 8, 9, 100, len(content) - 1] + [rng.randrange(len(content)) for _ in range(CASES)]
    for length in lengths:
        (victim / TENSORS).write_bytes(content[:length])
        assert outcome(victim)
    for extra in (b"\0", b"x" * 1000):
        (victim / TENSORS).write_bytes(content + extra)
        assert "too long" in outcome(victim)


def test_hostile_values_anywhere_in_the_json(good: Path, victim: Path) -> None:
    rng = random.Random(3)
    source, tensors = (good / CONFIG).read_text(), load((good / TENSORS).read_bytes())
    places = paths(json.loads(source))
    refused = 0
    for _ in range(2 * CASES):
        data = json.loads(source)
        put(data, rng.choice(places), rng.choice((*HOSTILE, ...)))
        rewrite(victim, data, tensors)
        refused += bool(outcome(victim))
    assert refused > CASES  # some places may hold anything


def test_hostile_values_anywhere_in_the_tensor_table(good: Path, victim: Path) -> None:
    rng, content = random.Random(4), (good / TENSORS).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    table = json.loads(content[8:end])
    places = [p for p in paths(table) if p[0] != "__metadata__"]
    for _ in range(2 * CASES):
        data = json.loads(content[8:end])
        path = rng.choice(places)
        value = rng.choice((*HOSTILE, ...))
        put(data, path, value)
        text = json.dumps(data).encode()
        (victim / TENSORS).write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
        assert outcome(victim) or data == table


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(good: Path, victim: Path, value: float) -> None:
    data = json.loads((good / CONFIG).read_text())
    for name in load((good / TENSORS).read_bytes()):
        tensors = load((good / TENSORS).read_bytes())
        tensors[name].view(-1)[-1] = value
        rewrite(victim, data, tensors)
        assert "NaN or infinite" in outcome(victim)


def test_missing_unknown_and_misshaped_tensors(good: Path, victim: Path) -> None:
    data, content = json.loads((good / CONFIG).read_text()), (good / TENSORS).read_bytes()
    changes: list[Callable[[dict[str, torch.Tensor], str], Any]] = [
        lambda t, n: t.pop(n),
        lambda t, n: t.update({n + "2": t[n].clone()}),
        lambda t, n: t.update({n: t[n].flatten().repeat(2)}),
        lambda t, n: t.update({n: t[n][None].clone()}),
        lambda t, n: t.update({n: t[n].half()}),
        lambda t, n: t.update({n: t[n][:0].clone()}),
    ]
    for i, name in enumerate(sorted(load(content))):
        tensors = load(content)
        if name.endswith("spectrum") and i % len(changes) == 0:
            continue  # may be absent
        changes[i % len(changes)](tensors, name)
        rewrite(victim, data, tensors)
        assert outcome(victim), name


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100000, b'{"a":' * 50000, b"1" * 5000, b'{"format":"kqsvd"}',
        b'{"format":"kqsvd","schema_version":1,"model":{}}', b'{"a":1,"a":2}', b'{"a":NaN}', b'{"x":"\\ud800"}',
        b'{"__metadata__":{"kqsvd":"{}"}}', b'{"__metadata__":{"kqsvd":1}}', b'{"__metadata__":[]}',
        b'{"__metadata__":{"kqsvd":"' + b"[" * 90000 + b'"}}', b'{"__metadata__":{"kqsvd":"{\\"a\\":1e999}"}}',
    ],
)  # fmt: skip
def test_hostile_headers(victim: Path, text: bytes) -> None:
    (victim / TENSORS).write_bytes(len(text).to_bytes(8, "little") + text)
    assert outcome(victim)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40, (4 << 20) + 1])
def test_huge_header_is_not_read(victim: Path, length: int) -> None:
    with (victim / TENSORS).open("wb") as f:
        f.write(length.to_bytes(8, "little"))
        f.truncate(min(length + 8, 1 << 33))  # a sparse file: no disk is used
    _refused_in_little_memory(victim)


def test_huge_declared_shapes_are_not_allocated(good: Path, victim: Path) -> None:
    data = json.loads((good / CONFIG).read_text())
    data["model"] |= {"num_heads": 1024, "num_kv_heads": 1024, "head_dim": 1024, "num_layers": 1024}
    layer = data["layers"][0] | {"head_dim": 1024}
    data["layers"] = [layer | {"index": i, "name": f"l{i}"} for i in range(1024)]
    data["predicted"] = []
    tensors = load((good / TENSORS).read_bytes())
    rewrite(victim, data, tensors)
    _refused_in_little_memory(victim)
    content = (good / TENSORS).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    table = json.loads(content[8:end])
    for entry in table.values():
        if "shape" in entry:
            entry |= {"shape": [2**31, 2**31, 2**31], "data_offsets": [0, 2**62]}
    text = json.dumps(table).encode()
    (victim / TENSORS).write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
    _refused_in_little_memory(victim)


def _refused_in_little_memory(folder: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert outcome(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB


def test_other_versions_are_refused_naming_both(good: Path, victim: Path) -> None:
    data, tensors = json.loads((good / CONFIG).read_text()), load((good / TENSORS).read_bytes())
    for version in (0, 2, "1", None):
        rewrite(victim, data | {"schema_version": version}, tensors)
        assert f"schema version {version}, this vllm_kqsvd reads version 1" in outcome(victim)
    rewrite(victim, data | {"format": "gguf"}, tensors)
    assert "'gguf' found, 'kqsvd' expected" in outcome(victim)


def test_parts_of_two_projections(good: Path, victim: Path) -> None:
    other = victim / "other"
    save_projection(tiny_projection(spectrum=False), other)
    (victim / CONFIG).write_bytes((other / CONFIG).read_bytes())
    assert "differ" in outcome(victim)
    (victim / CONFIG).unlink()
    assert not outcome(victim)  # the header alone is enough


def test_missing_layer(good: Path, victim: Path) -> None:
    data, tensors = json.loads((good / CONFIG).read_text()), load((good / TENSORS).read_bytes())
    rewrite(victim, data | {"layers": data["layers"][:2]}, tensors)
    assert "2 layers found, the model has 3" in outcome(victim)
    rewrite(victim, data | {"layers": data["layers"][1:] + data["layers"][:1]}, tensors)
    assert "out of order" in outcome(victim)


def test_what_is_not_a_regular_file(victim: Path) -> None:
    def pipe(file: Path) -> None:
        os.mkfifo(file)

    makers: list[Callable[[Path], Any]] = [
        pipe,
        lambda file: file.mkdir(),
        lambda file: file.symlink_to("/dev/zero"),
        lambda file: file.symlink_to("/dev/tty"),
        lambda file: file.symlink_to(file.name),
        lambda file: file.symlink_to("/nowhere"),
        lambda file: file.symlink_to("/etc/passwd"),
    ]
    for name in (CONFIG, TENSORS):
        for make in makers:
            file = victim / name
            file.rmdir() if file.is_dir() and not file.is_symlink() else file.unlink(missing_ok=True)
            make(file)
            text = outcome(victim)
            assert text and "root:" not in text
        file.unlink()


def test_symbolic_links_to_a_sound_file_are_followed(good: Path, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()  # as a hub's cache folder looks
    for name in (TENSORS, CONFIG):
        (tmp_path / "p" / name).symlink_to(good / name)
    assert not outcome(tmp_path / "p")


@pytest.mark.parametrize("path", ["", "nowhere", "nul\0byte", "x" * 5000, "/dev/null", "/etc/passwd"])
def test_paths_that_hold_nothing(tmp_path: Path, path: str) -> None:
    with pytest.raises(ProjectionFileError):
        load_projection(tmp_path / path)
