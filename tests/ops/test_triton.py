# SPDX-License-Identifier: Apache-2.0
"""Runs triton_cases.py in Triton's interpreter, which has to be chosen before Triton is first imported."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from vllm_kqsvd.errors import KernelError
from vllm_kqsvd.ops import choose


def _release(package: str) -> tuple[int, ...]:
    return tuple(int(x) for x in version(package).split(".")[:2])


def _unusable() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    if _release("triton") < (3, 7) and _release("numpy") >= (2, 4):
        return "the interpreter of Triton before 3.7 needs numpy < 2.4"
    return None


@pytest.mark.skipif(_unusable() is not None, reason=_unusable() or "")
def test_kernels_in_the_interpreter():
    root = Path(__file__).parents[2]
    cases = Path(__file__).with_name("triton_cases.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(cases)]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")
def test_refused_without_a_gpu():
    with pytest.raises(KernelError, match="triton"):
        choose(torch.device("cuda"), "triton")
