# SPDX-License-Identifier: Apache-2.0
"""Calibration that is killed at random points and resumed writes the same bytes; a damaged or shared state is named."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.calibration.conftest import make_model
from tests.reliability import LONG, sized
from tests.reliability.folders import child

FILES = ("kqsvd.safetensors", "kqsvd_config.json", "README.md", "spectrum.png")
OPTIONS = ["--num-windows", "4", "--window-length", "128", "--gradient-windows", "2", "--gradient-length", "128",
           "--samples", "256", "--bits", "4", "--device", "cpu"]  # fmt: skip

# Every calibration is a fork of a process that has imported everything and computed nothing.
SCRIPT = """
import json, os, random, signal, sys, time
import torch
from vllm_kqsvd.calibration import calibrate, cli, collect
from vllm_kqsvd.cli import main

torch.set_num_threads(1)
collect._SAVE_SECONDS = -1.0  # after every window, so that kills hit the saving too
model, text, top, kills, *options = sys.argv[1:]
rng = random.Random(int(kills))

def fork(output, *more):
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            os.dup2(os.open(f"{output}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
            os.dup2(1, 2)
            status = main(["calibrate", model, "--output", output, "--data", text, *options, *more])
        finally:
            os._exit(status)
    return pid

def finished(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

began = time.monotonic()
assert finished(fork(top + "/whole")) == 0, open(top + "/whole.log").read()
seconds = time.monotonic() - began
killed = stages = 0
for n in range(int(kills)):
    pid = fork(top + "/cut", "--resume")
    if n % 2:  # in the part that a resumed run skips
        while not os.path.exists(top + "/.cut.partial/statistics.safetensors"):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            time.sleep(0.001)
        time.sleep(rng.uniform(0, seconds / 4))
    else:
        time.sleep(rng.uniform(0, seconds))
    os.kill(pid, signal.SIGKILL)
    killed += finished(pid) == -signal.SIGKILL
    left = os.listdir(top + "/cut") if os.path.isdir(top + "/cut") else []
    assert not left or "kqsvd.safetensors" in left, left
    stages += os.path.exists(top + "/.cut.partial/statistics.safetensors")
assert finished(fork(top + "/cut", "--resume")) == 0, open(top + "/cut.log").read()
print(json.dumps({"killed": killed, "with_statistics": stages, "seconds": seconds}))
"""


def test_killed_at_random_points_the_result_is_the_same(text_of_words: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama")
    kills = sized(4, 40)
    answer = json.loads(
        child(SCRIPT, model, text_of_words, tmp_path, kills, *OPTIONS, seconds=3600 if LONG else 300).splitlines()[-1]
    )
    print(answer)
    assert answer["killed"] > kills // 2 and answer["with_statistics"] > 0
    for name in FILES:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes(), name
    left = {f.name for f in tmp_path.iterdir()}
    assert left == {"model", "whole", "cut", "whole.log", "cut.log"}


@pytest.fixture
def text_of_words(tmp_path: Path) -> Path:
    """20 kB of made-up words."""
    rng = random.Random(3)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(300)]
    path = tmp_path / "model" / "words.txt"
    path.parent.mkdir()
    path.write_text("\n".join(" ".join(rng.choices(words, k=12)) for _ in range(300)))
    return path
