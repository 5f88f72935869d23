# SPDX-License-Identifier: Apache-2.0
"""A disk that fills up at any point: one sentence, nothing under the final name, and --resume once there is room."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.calibration.conftest import make_model
from tests.projections import tiny_projection
from tests.reliability import LONG
from tests.reliability.folders import environment
from tests.reliability.test_calibration_killed import OPTIONS
from vllm_kqsvd.projection import save_projection

# A user namespace may mount: a file system of a few pages that nobody else sees.
IN_NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]
SCRIPT = """
import contextlib, io, json, os, subprocess, sys
import torch
from vllm_kqsvd.calibration import calibrate, cli, collect
from vllm_kqsvd.cli import main
from vllm_kqsvd.errors import ProjectionFileError
from vllm_kqsvd.projection import load_projection, save_projection

torch.set_num_threads(1)
collect._SAVE_SECONDS = -1.0
disk, source, model, text, small, sizes, *options = sys.argv[1:]

def room(kilobytes):
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", disk], check=True)

subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "none", disk], check=True)
projection = load_projection(source)
failed = 0
for size in json.loads(small):
    room(size)
    try:
        save_projection(projection, disk + "/p")
    except ProjectionFileError as e:
        assert "cannot be written (" in str(e) and "free some space" in str(e), e
        assert os.listdir(disk) == [], os.listdir(disk)
        failed += 1
room(1000)
digest = save_projection(projection, disk + "/p")
room(os.statvfs(disk).f_frsize * (os.statvfs(disk).f_blocks - os.statvfs(disk).f_bfree) // 1024 + 8)
try:
    save_projection(projection, disk + "/p")
except ProjectionFileError:
    failed += 1
assert load_projection(disk + "/p").digest == digest and os.listdir(disk) == ["p"]
room(1000)
subprocess.run(["rm", "-r", disk + "/p"], check=True)

messages = []
for size in json.loads(sizes):
    room(size)
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = main(["calibrate", model, "--output", disk + "/q", "--data", text, "--resume", *options])
    messages.append(said.getvalue().splitlines()[-1] if status else "done")
    assert status == 0 or not os.path.exists(disk + "/q"), os.listdir(disk)
    if status == 0:
        break
assert main(["calibrate", model, "--output", source + "2", "--data", text, *options]) == 0
both = [open(f"{folder}/kqsvd.safetensors", "rb").read() for folder in (disk + "/q", source + "2")]
print(json.dumps({"failed": failed, "messages": messages, "same": both[0] == both[1]}))
"""


def may_mount() -> bool:
    """Whether this machine lets users make a mount namespace."""
    if shutil.which("unshare") is None:
        return False
    try_it = "mount -t tmpfs -o size=4k none /mnt && mount -o remount,size=8k /mnt"
    return subprocess.run([*IN_NAMESPACE, "sh", "-c", try_it], capture_output=True).returncode == 0


def test_a_full_disk(tmp_path: Path) -> None:
    if not may_mount():
        pytest.skip("user namespaces that may mount are not allowed here")
    model = make_model(tmp_path / "model", "llama")
    rng = random.Random(3)
    text = tmp_path / "words.txt"
    text.write_text(" ".join("".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(4000)))
    save_projection(tiny_projection(), tmp_path / "source")
    need = sum(f.stat().st_size for f in (tmp_path / "source").iterdir()) // 1024
    small = list(range(4, need, 4 if LONG else 40))
    sizes = [*(range(4, 1600, 60) if LONG else (4, 400)), 8000]
    (tmp_path / "disk").mkdir()
    arguments = [tmp_path / "disk", tmp_path / "source", model, text, json.dumps(small), json.dumps(sizes), *OPTIONS]
    command = [*IN_NAMESPACE, sys.executable, "-c", SCRIPT, *map(str, arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    print(answer["failed"], answer["messages"])
    assert answer["failed"] >= len(small)
    assert answer["messages"][-1] == "done" and len(answer["messages"]) > 1
    for message in answer["messages"][:-1]:
        assert "free some space or choose another --output" in message, message
    assert answer["same"]
