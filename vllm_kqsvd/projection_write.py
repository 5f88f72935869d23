# SPDX-License-Identifier: Apache-2.0
"""Writing of a projection folder: under a temporary name beside the final one, synced, then renamed.

Whoever reads meanwhile, or after a kill at any point, finds the old projection or the new one under the final name.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import shutil
import tempfile
from glob import escape as glob_escape
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from vllm_kqsvd.errors import ProjectionFileError
from vllm_kqsvd.projection import Projection
from vllm_kqsvd.projection_read import (
    CONFIG_FILE,
    SIDE_TENSORS,
    TENSOR_FILE,
    assemble,
    check_declared,
    digest_of,
)
from vllm_kqsvd.projection_schema import (
    FORMAT,
    MAX_HEADER_BYTES,
    SCHEMA_VERSION,
    SIDES,
    canonical,
    fail,
    parse_header,
    parse_json,
)

CARD_FILE, PLOT_FILE = "README.md", "spectrum.png"
FILES = frozenset((TENSOR_FILE, CONFIG_FILE, CARD_FILE, PLOT_FILE))
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux' renameat2


def to_json(projection: Projection) -> dict[str, Any]:
    """The JSON header, `digest` excluded."""
    m = projection.model
    model = {
        "architecture": m.architecture,
        "num_layers": m.num_layers,
        "num_heads": m.num_heads,
        "num_kv_heads": m.num_kv_heads,
        "head_dim": m.head_dim,
        "rope": [
            {
                "rotary_dim": r.rotary_dim,
                "interleaved": r.interleaved,
                "type": r.type,
                "parameters": r.parameters,
            }
            for r in m.rope
        ],
        "weights_sha256": m.weights_sha256,
    }
    layers = [
        {
            "index": e.index,
            "name": e.name,
            "rope_mode": e.rope_mode,
            "rope_block": e.rope_block,
            "rope": e.rope,
            "max_position": e.max_position,
            "k": e.codec.k.plan.to_json(),
            "v": e.codec.v.plan.to_json(),
            "basis": {"k": e.k_basis, "v": e.v_basis},
            "head_dim": e.codec.head_dim,
        }
        for _, e in sorted(projection.layers.items())
    ]
    return {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "created_by": projection.created_by,
        "model": model,
        "layers": layers,
        "calibration": projection.calibration,
        "predicted": list(projection.predicted),
    }


def to_tensors(projection: Projection) -> dict[str, torch.Tensor]:
    """Every tensor of the file under its name, on the CPU, in the file's dtype."""
    out = {
        f"rope.{n}.inv_freq": r.inv_freq.to("cpu", torch.float64).clone() for n, r in enumerate(projection.model.rope)
    }
    for i, entry in sorted(projection.layers.items()):
        for side in SIDES:
            codec = getattr(entry.codec, side)
            for name in SIDE_TENSORS:
                tensor = getattr(codec, name).detach().to("cpu", torch.float32)
                out[f"layers.{i}.{side}.{name}"] = tensor.clone(memory_format=torch.contiguous_format)
            if entry.spectrum is not None:
                spectrum = entry.spectrum[side].detach().to("cpu", torch.float32)
                out[f"layers.{i}.{side}.spectrum"] = spectrum.clone(memory_format=torch.contiguous_format)
    return out


def write_folder(projection: Projection, folder: Path) -> str:
    """See `projection.save_projection`."""
    try:
        return _write(projection, folder)
    except ProjectionFileError as e:
        raise ProjectionFileError(f"projection {folder}: {e}") from e
    except (OSError, ValueError, SafetensorError) as e:
        reason = getattr(e, "strerror", None) or str(e)[:200]
        raise ProjectionFileError(
            f"projection {folder}: cannot be written ({reason}); free some space or choose another --output"
        ) from e


def _write(projection: Projection, folder: Path) -> str:
    tensors, data = to_tensors(projection), to_json(projection)
    data["digest"] = digest_of(tensors, data)
    data = parse_json(canonical(data))  # what readers will see
    _self_check(projection, data, tensors)
    _refuse_foreign(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    lock = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # held until this process ends or has finished: see _remove_abandoned
        text = canonical(data).decode()
        save_file(tensors, work / TENSOR_FILE, metadata={FORMAT: text})
        (work / CONFIG_FILE).write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")
        _write_card(projection, data["digest"], work)
        for file in sorted(work.iterdir()):
            os.chmod(file, 0o644)
            _sync(file)
        os.chmod(work, 0o755)
        _sync(work)
        _replace(work, folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)  # what was not finished, or the projection that was replaced
        os.close(lock)
    return str(data["digest"])


def _self_check(projection: Projection, data: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Hold what is about to be written to the reader's own rules."""
    header = parse_header(data)
    at, raw = 0, {}
    for name, x in tensors.items():
        size = x.numel() * x.element_size()
        dtype = "F64" if x.dtype == torch.float64 else "F32"
        raw[name] = {"dtype": dtype, "shape": list(x.shape), "data_offsets": [at, at + size]}
        at += size
    check_declared(raw, header, at)
    assemble(header, tensors)
    if len(canonical(data)) + 200 * len(tensors) > MAX_HEADER_BYTES // 2:
        raise fail("the header is too large; record less in `calibration`")
    for entry in projection.layers.values():
        mine, shared = entry.codec.rope.inv_freq.cpu(), projection.model.rope[entry.rope].inv_freq.cpu()
        if entry.rope_block and not torch.equal(mine.double(), shared.double()):
            raise fail(f"layer {entry.index} has other frequencies than rope setting {entry.rope}")


def _write_card(projection: Projection, digest: str, work: Path) -> None:
    try:
        from vllm_kqsvd.model_card import write_card
    except ImportError:
        return
    write_card(projection, digest, work)


def _refuse_foreign(folder: Path) -> None:
    """Only an absent or empty folder, or one that holds nothing but a projection, may be replaced."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ProjectionFileError("exists and is not a folder; choose another --output")
    if not folder.exists():
        return
    found = {f.name for f in folder.iterdir()}
    if found and (TENSOR_FILE not in found or found - FILES):
        foreign = sorted(found - FILES) or sorted(found)
        raise ProjectionFileError(f"exists and holds other files ({', '.join(foreign[:3])}); choose another --output")


def _remove_abandoned(folder: Path) -> None:
    """Delete what writers of this folder left that were killed; a living one holds its lock."""
    for work in folder.parent.glob(f".{glob_escape(folder.name)}.????????.tmp"):
        try:
            fd = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(work, ignore_errors=True)
        except OSError:
            pass
        finally:
            os.close(fd)


def _replace(work: Path, folder: Path) -> None:
    """Give `work` the final name; `work` then names the older projection, if there was one."""
    if not folder.exists() or not any(folder.iterdir()):
        os.rename(work, folder)
    elif not _exchange(work, folder):
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".old", dir=folder.parent))
        os.rename(folder, old)
        try:
            os.rename(work, folder)
        except OSError:
            os.rename(old, folder)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; False where the file system or the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM, errno.EXDEV):
        return False
    raise OSError(code, os.strerror(code))


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
