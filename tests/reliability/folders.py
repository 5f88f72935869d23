# SPDX-License-Identifier: Apache-2.0
"""How a projection folder is damaged, and what the reader may answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vllm_kqsvd.errors import ProjectionFileError
from vllm_kqsvd.inspect_projection import as_text, report
from vllm_kqsvd.projection import load_projection
from vllm_kqsvd.projection_read import digest_of

ROOT = Path(__file__).resolve().parents[2]
TENSORS, CONFIG = "kqsvd.safetensors", "kqsvd_config.json"
SECONDS = 10  # that one refusal may take on a busy machine
NESTED: Any = []
for _ in range(200):
    NESTED = [NESTED]
HOSTILE = (
    None, True, -1, 0, 1, 3, 10**9, 10**30, 10**4000, 2**63, -(2**63), 0.5, -0.0, 1e308, 5e-324, "", "x", "\n", "\x00",
    "\x1b[2J", "\ud800", "\u202e", "\ufeff", "a" * 5000, "../../etc/passwd", "/etc/passwd", "file:///etc/passwd",
    "__import__('os').system('true')", "!!python/object/apply:os.system", "%s%n", "{0.__class__}", "${HOME}", "NaN",
    [], [[]], [None], [[4, [0]]], [[2, [0, 0]]], [[8, [63]]], [[1e9, [1e9]]], NESTED, {}, {"": {}}, {"__proto__": {}},
)  # fmt: skip


def outcome(folder: Path) -> str:
    """ "" if the folder is read as a sound projection (and can be shown), else the text of its one error."""
    started = time.monotonic()
    try:
        projection = load_projection(folder)
    except ProjectionFileError as e:
        text = str(e)
        assert text.isprintable() and len(text) < 1000 and str(folder) in text, repr(text)
        assert time.monotonic() - started < SECONDS
        return text
    assert len(projection.layers) == projection.model.num_layers
    for entry in projection.layers.values():
        for side in (entry.codec.k, entry.codec.v):
            assert all(torch.isfinite(x).all() for x in (side.encode, side.decode, side.mean, side.sink))
    shown = as_text(report(projection))
    assert all(line.isprintable() for line in shown.splitlines()), repr(shown)
    json.dumps(report(projection))
    return ""


def rewrite(folder: Path, data: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Write both files with a digest that is right, so that only the content can be refused."""
    try:
        data = data | {"digest": digest_of(tensors, data)}
    except (ProjectionFileError, UnicodeError):
        pass
    text = json.dumps(data)
    save_file(tensors, folder / TENSORS, {"kqsvd": text})
    (folder / CONFIG).write_text(text)


def with_table(content: bytes, table: bytes | str) -> bytes:
    """The safetensors file `content` with another header."""
    text = table.encode() if isinstance(table, str) else table
    return len(text).to_bytes(8, "little") + text + content[header_end(content) :]


def header_end(content: bytes) -> int:
    """Where the tensors of a safetensors file begin."""
    return 8 + int.from_bytes(content[:8], "little")


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


def environment(**extra: str) -> dict[str, str]:
    """Environment of a child that imports this checkout."""
    found = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": found, "OMP_NUM_THREADS": "1", **extra}


def child(script: str, *arguments: object, seconds: float = 120) -> str:
    """Standard output of a Python script in a process of its own; its end by a signal or an error fails the test."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout
