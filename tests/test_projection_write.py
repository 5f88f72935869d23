# SPDX-License-Identifier: Apache-2.0
"""Writing ends with a complete folder under the final name, or with one error and what was there before."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.projections import tiny_projection
from vllm_kqsvd import projection_write
from vllm_kqsvd.errors import ProjectionFileError
from vllm_kqsvd.projection import Projection, load_projection, save_projection

# a process whose files may not outgrow the given size: writing fails in the kernel as on a full disk
_LIMITED = """
import resource, sys
from vllm_kqsvd.errors import ProjectionFileError
from vllm_kqsvd.projection import load_projection, save_projection
projection = load_projection(sys.argv[2])
for limit in map(int, sys.argv[3:]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        save_projection(projection, sys.argv[1])
    except ProjectionFileError as e:
        assert "cannot be written" in str(e), e
    else:
        raise SystemExit(f"written within {limit} bytes")
"""


def test_full_disk_leaves_nothing(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    golden = str(Path(__file__).parent / "data" / "projection_v1")
    command = [sys.executable, "-c", _LIMITED, str(tmp_path / "p"), golden, "0", "100", "4096", "12000"]
    subprocess.run(command, check=True, env=environment, timeout=120)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["save_file", "_write_card", "_sync", "_replace"])
def test_failure_at_any_step_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    before = save_projection(tiny_projection(), tmp_path / "p")

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(projection_write, step, fail)
    with pytest.raises(ProjectionFileError, match="No space left on device"):
        save_projection(tiny_projection(spectrum=False), tmp_path / "p")
    with pytest.raises(ProjectionFileError, match="No space left"):
        save_projection(tiny_projection(), tmp_path / "new")
    assert [f.name for f in tmp_path.iterdir()] == ["p"]
    assert load_projection(tmp_path / "p").digest == before


def test_interrupted_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = save_projection(tiny_projection(), tmp_path / "p")
    monkeypatch.setattr(projection_write, "_exchange", lambda *_: False)  # as on a file system that cannot
    real, calls = os.rename, []

    def rename(a: object, b: object) -> None:
        calls.append(b)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        real(a, b)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(ProjectionFileError, match="Input/output error"):
        save_projection(tiny_projection(spectrum=False), tmp_path / "p")
    assert load_projection(tmp_path / "p").digest == before
    assert [f.name for f in tmp_path.iterdir()] == ["p"]


def test_an_older_projection_and_an_empty_folder_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    first = save_projection(tiny_projection(), tmp_path / "p")
    second = save_projection(tiny_projection(spectrum=False), tmp_path / "p")
    assert first != second == load_projection(tmp_path / "p").digest
    assert [f.name for f in tmp_path.iterdir()] == ["p"]


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    (folder / "thesis.tex").write_text("ten years of work")
    with pytest.raises(ProjectionFileError, match=r"other files \(thesis\.tex\)"):
        save_projection(tiny_projection(), folder)
    (folder / "kqsvd.safetensors").write_text("")
    with pytest.raises(ProjectionFileError, match=r"thesis\.tex"):
        save_projection(tiny_projection(), folder)
    assert (folder / "thesis.tex").read_text() == "ten years of work"
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "file").write_text("")
    for name in ("link", "file"):
        with pytest.raises(ProjectionFileError, match="not a folder"):
            save_projection(tiny_projection(), tmp_path / name)


@pytest.mark.parametrize("place", ["file/p", "/proc/p", "nul\0byte", "x" * 300])
def test_unwritable_places_are_one_error(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ProjectionFileError):
        save_projection(tiny_projection(), tmp_path / place)


def _broken(name: str) -> Projection:
    good = tiny_projection()
    entry = good.layers[0]
    k = entry.codec.k
    if name == "nan":
        return _with_k(good, replace(k, encode=k.encode * float("nan")))
    if name == "negative weight":
        return _with_k(good, replace(k, scale_weight=-k.scale_weight))
    if name == "missing layer":
        return replace(good, layers={0: good.layers[0], 2: good.layers[2]})
    if name == "heads":
        return good.at_heads(0, 1)
    if name == "frequencies":
        other = replace(entry.codec, rope=replace(entry.codec.rope, inv_freq=entry.codec.rope.inv_freq * 2))
        return replace(good, layers=good.layers | {0: replace(entry, codec=other)})
    if name == "mode":
        return replace(good, layers=good.layers | {0: replace(entry, rope_mode="post")})
    if name == "calibration":
        return replace(good, calibration={"model": object()})
    return replace(good, predicted=[float("inf")] * 3)


def _with_k(good: Projection, k: object) -> Projection:
    entry = good.layers[0]
    return replace(good, layers=good.layers | {0: replace(entry, codec=replace(entry.codec, k=k))})


@pytest.mark.parametrize(
    "name", ["nan", "negative weight", "missing layer", "heads", "frequencies", "mode", "calibration", "predicted"]
)
def test_a_projection_that_could_not_be_read_is_not_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(ProjectionFileError):
        save_projection(_broken(name), tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def test_tensors_in_other_dtypes_and_strides_are_written(tmp_path: Path) -> None:
    good = tiny_projection()
    entry = good.layers[0]
    k = entry.codec.k
    strided = replace(k, decode=k.decode.transpose(1, 2).contiguous().transpose(1, 2), encode=k.encode.double())
    save_projection(_with_k(good, strided), tmp_path / "p")
    assert torch.equal(load_projection(tmp_path / "p").layers[0].codec.k.decode, k.decode)
