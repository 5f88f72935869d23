# SPDX-License-Identifier: Apache-2.0
"""Projection folders whose bytes are damaged, cut, swapped or of the wrong kind: one clear error, never a crash."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from tests.projections import tiny_projection, write_model
from tests.reliability import LONG, sized
from tests.reliability.folders import CONFIG, TENSORS, header_end, outcome, rewrite
from vllm_kqsvd.errors import ProjectionFileError
from vllm_kqsvd.projection import ModelFingerprint, load_projection, save_projection


@pytest.mark.parametrize("name", [TENSORS, CONFIG])
def test_one_flipped_bit_in_every_byte_of_the_text(good: Path, victim: Path, name: str) -> None:
    rng, before = random.Random(1), load_projection(good).digest
    content = (good / name).read_bytes()
    text = header_end(content) if name == TENSORS else len(content)
    for at in range(text) if LONG else sorted(rng.sample(range(text), 250)):
        broken = bytearray(content)
        broken[at] ^= 1 << rng.randrange(8)
        (victim / name).write_bytes(broken)
        if not outcome(victim):  # a flip may turn one blank into another
            assert load_projection(victim).digest == before and content[at : at + 1].isspace()


def test_flipped_bits_and_bytes_in_the_tensors(good: Path, victim: Path) -> None:
    rng, content = random.Random(5), (good / TENSORS).read_bytes()
    begin = header_end(content)
    for case in range(sized(100, 3000)):
        broken = bytearray(content)
        for _ in range(1 if case % 2 else rng.randrange(1, 50)):
            broken[rng.randrange(begin, len(content))] ^= rng.randrange(1, 256)
        (victim / TENSORS).write_bytes(broken)
        assert "digest" in outcome(victim)


def test_every_length_of_truncation_and_extension(good: Path, victim: Path) -> None:
    rng = random.Random(2)
    for name in (TENSORS, CONFIG):
        content = (good / name).read_bytes()
        lengths = [0, 1, 7, 8, 9, 100, len(content) - 1]
        for length in lengths + [rng.randrange(len(content)) for _ in range(sized(40, 1000))]:
            (victim / name).write_bytes(content[:length])
            assert outcome(victim) or content[length:].isspace()
        (victim / name).write_bytes(content)
    for extra in (b"\0", b"x" * 1000):
        (victim / TENSORS).write_bytes((good / TENSORS).read_bytes() + extra)
        assert "too long" in outcome(victim)


def test_blocks_lost_to_a_crash(good: Path, victim: Path) -> None:
    """Zeroed and swapped disk blocks, as a file system may leave them after a power loss."""
    rng, content = random.Random(6), (good / TENSORS).read_bytes()
    blocks = range(0, len(content) - 1024, 512)
    for case in range(sized(60, 1000)):
        broken, a, b = bytearray(content), *rng.sample(blocks, 2)
        broken[a : a + 512] = bytes(512) if case % 2 else content[b : b + 512]
        (victim / TENSORS).write_bytes(broken)
        assert outcome(victim) or bytes(broken) == content


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
        for change in changes if LONG else changes[i % len(changes) :][:1]:
            if change is changes[0] and name.endswith("spectrum"):
                continue  # may be absent
            tensors = load(content)
            change(tensors, name)
            rewrite(victim, data, tensors)
            assert outcome(victim), name


def test_parts_of_two_projections(good: Path, victim: Path) -> None:
    other = victim / "other"
    save_projection(tiny_projection(spectrum=False), other)
    (victim / CONFIG).write_bytes((other / CONFIG).read_bytes())
    assert "differ" in outcome(victim)
    (victim / CONFIG).unlink()
    assert not outcome(victim)  # the header alone is enough
    mine, theirs = ((f / TENSORS).read_bytes() for f in (good, other))
    (victim / TENSORS).write_bytes(theirs[: header_end(theirs)] + mine[header_end(mine) :])
    assert outcome(victim)


def test_swapped_between_models(tmp_path: Path) -> None:
    models = [write_model(tmp_path / f"m{seed}", seed) for seed in (0, 1)]
    models.append(write_model(tmp_path / "longer", num_hidden_layers=4))
    models.append(write_model(tmp_path / "turned", rope_parameters={"rope_type": "default", "rope_theta": 5e5}))
    for i, model in enumerate(models[:2]):
        save_projection(tiny_projection(ModelFingerprint.from_hf(model)), tmp_path / f"p{i}")
    for i in (0, 1):
        projection = load_projection(tmp_path / f"p{i}")
        projection.check_model(models[i])
        words = ("weights", "num_layers 3 in the file, 4 in the model", "rope_theta 500000.0) in the model")
        for other, word in zip((models[1 - i], *models[2:]), words, strict=True):
            with pytest.raises(ProjectionFileError, match="made for another model") as error:
                projection.check_model(other)
            assert word in str(error.value)


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
        lambda file: file.symlink_to("../" * 40 + "etc/passwd"),
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
    (tmp_path / "q").symlink_to(tmp_path / "p")
    assert not outcome(tmp_path / "p") and not outcome(tmp_path / "q")


@pytest.mark.parametrize("path", ["", "nowhere", "nul\0byte", "x" * 5000, "/dev/null", "/etc/passwd", "../" * 50])
def test_paths_that_hold_nothing(tmp_path: Path, path: str) -> None:
    with pytest.raises(ProjectionFileError):
        load_projection(tmp_path / path)
