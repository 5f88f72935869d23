# SPDX-License-Identifier: Apache-2.0
"""What each worker says about itself to the server's front end: one small JSON file per rank.

vLLM's front end serves /metrics, but only the workers know which kernels run, what the self-test found and whether
a value was not finite, and vLLM has no channel from them for a plugin's own numbers. The process that starts a
server names a private folder in the environment, which its engine and workers inherit; the first worker creates it.
Ranks on other hosts write where nobody reads: their numbers are missing, and `ranks` says so. Imports no vLLM.
"""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import secrets
import shutil
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

FOLDER = "KQSVD_STATUS_DIR"  # set by `open_session`, for the processes of one server


@dataclass
class RankStatus:
    """One rank's numbers. Bytes are per token over this rank's layers; tokens count exact windows and padding.

    layers: "rope mode/kernels" -> count; "native/vllm" are those with vLLM's own cache, beside which kv_tokens_exact
    is 0: not known. self_test: "passed" and "skipped" -> layers. self_test_error: largest relative difference from
    the reference. window_blocks: blocks the exact window of one decoding request can hold.
    """

    engine: int = 0
    rank: int = 0
    pipeline_rank: int = 0
    tensor_rank: int = 0
    digest: str = ""
    kernels: str = ""
    layers: dict[str, int] = field(default_factory=dict)
    latent_bytes: int = 0
    exact_bytes: int = 0
    bits_per_element: float = 0.0
    block_size: int = 0
    window: int = 0
    window_block_size: int = 0
    window_blocks: int = 0
    num_blocks: int = 0
    kv_tokens: int = 0
    kv_tokens_exact: int = 0
    max_model_len: int = 0
    self_test: dict[str, int] = field(default_factory=dict)
    self_test_error: float = 0.0
    nan_trips: int = 0


def open_session() -> None:
    """Name a folder for the server this process may start; children of a server keep their parent's."""
    folder = os.environ.get(FOLDER, "")
    if folder and multiprocessing.parent_process() is not None:
        return
    prefix = f"kqsvd-{os.getpid()}-"
    if not Path(folder).name.startswith(prefix):
        os.environ[FOLDER] = str(Path(tempfile.gettempdir(), prefix + secrets.token_hex(12)))
        atexit.register(_close_session, os.environ[FOLDER], os.getpid())


def _close_session(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # not in a forked child
        shutil.rmtree(folder, ignore_errors=True)


def publish(status: RankStatus) -> None:
    """Write this rank's numbers in one step. Never raises: a full disk must not stop a server."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return
    name = f"engine{status.engine}-rank{status.rank}.json"
    part = Path(folder, f".{name}.{os.getpid()}")
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        part.write_text(json.dumps(asdict(status)))
        os.replace(part, Path(folder, name))
    except OSError:
        with suppress(OSError):
            part.unlink()


def stamp() -> tuple[tuple[str, int], ...]:
    """Changes whenever a rank has published; cheap."""
    folder = os.environ.get(FOLDER)
    if not folder or not os.path.isdir(folder):
        return ()
    try:
        return tuple(sorted((e.name, e.stat().st_mtime_ns) for e in os.scandir(folder) if e.name.endswith(".json")))
    except OSError:
        return ()


def read_all() -> list[RankStatus]:
    """What every rank of this server published, by engine and rank; unreadable files are left out."""
    known = {f.name for f in fields(RankStatus)}
    found = []
    for name, _ in stamp():
        try:
            data = json.loads(Path(os.environ[FOLDER], name).read_text())
            found.append(RankStatus(**{k: v for k, v in data.items() if k in known}))
        except (OSError, ValueError, TypeError):
            continue
    return sorted(found, key=lambda s: (s.engine, s.rank))
