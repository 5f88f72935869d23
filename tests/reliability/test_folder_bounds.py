# SPDX-License-Identifier: Apache-2.0
"""Reading a hostile folder stays within memory limits, runs nothing, and opens nothing but the folder's two files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from tests.reliability import sized
from tests.reliability.folders import CONFIG, TENSORS, child, header_end, rewrite, with_table

# 384 MiB of address space above what the imports took, no new process or thread, and an audit hook that ends the
# process at anything but listing a folder and reading one of the two files.
LIMITED = """
import os, resource, sys
import torch
from vllm_kqsvd.projection import load_projection

good, victims = sys.argv[1], sys.argv[2:]
torch.set_num_threads(1)
load_projection(good)  # everything is imported now
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = used + (384 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
harmless = {"object.__getattr__", "object.__setattr__", "os.listdir", "builtins.id", "sys._getframe"}
names = {"kqsvd.safetensors", "kqsvd_config.json", *victims}
watching = False

def watch(event, arguments):
    global watching
    if not watching or event in harmless:
        return
    if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        if isinstance(arguments[0], int) or str(arguments[0]) in names:
            return
    watching = False
    os.write(2, f"{event} {arguments!r}".encode())
    os._exit(9)

sys.addaudithook(watch)
for victim in victims:
    watching, answer = True, "read"
    try:
        load_projection(victim)
    except Exception as e:
        answer = f"{type(e).__name__} {e}"
    watching = False
    print(answer)
"""
CODE = ("__import__('os').system('touch ran')", "!!python/object/apply:os.system [id]", "/etc/passwd", "../../x")
HUGE = {2**64 - 1: "truncated", 2**63: "truncated", 2**40: "truncated", (4 << 20) + 1: "at most 4194304 are read"}


@pytest.fixture(scope="module")
def answers(good: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a limited process says about each hostile folder."""
    top = tmp_path_factory.mktemp("bounds")
    content, source = (good / TENSORS).read_bytes(), (good / CONFIG).read_text()
    data, tensors = json.loads(source), load(content)

    def folder(name: str, tensor_file: bytes = content) -> Path:
        (top / name).mkdir()
        (top / name / TENSORS).write_bytes(tensor_file)
        return top / name

    def sparse(file: Path, size: int) -> None:
        with file.open("ab") as f:
            f.truncate(size)

    for length in HUGE:
        sparse(folder(f"header {length}", length.to_bytes(8, "little")) / TENSORS, min(length + 8, 1 << 33))
    model = data["model"] | {"num_heads": 1024, "num_kv_heads": 1024, "head_dim": 1024, "num_layers": 1024}
    layers = [data["layers"][0] | {"head_dim": 1024, "index": i, "name": f"l{i}"} for i in range(1024)]
    means = {f"layers.{i}.{s}.mean_basis": torch.zeros(1, 1) for i in range(1024) for s in "kv"}
    rewrite(folder("model"), data | {"model": model, "layers": layers, "predicted": []}, tensors | means)
    table = json.loads(content[8 : header_end(content)])
    huge = {n: e | {"shape": [2**31] * 3, "data_offsets": [0, 2**62]} for n, e in table.items() if "shape" in e}
    folder("shapes", with_table(content, json.dumps(table | huge)))
    sparse(folder("long") / TENSORS, 1 << 40)
    sparse(folder("config") / CONFIG, 1 << 40)
    many = json.dumps(data | {"calibration": {"x": 0}}).replace(
        '"x": 0', f'"x": [{"[]," * sized(150_000, 1_300_000)}[]]'
    )
    table["__metadata__"] = {"kqsvd": many}
    (folder("costly", with_table(content, json.dumps(table))) / CONFIG).write_text(many)
    rewrite(folder("words"), data | {"calibration": {w: w for w in CODE}}, tensors)
    rewrite(folder("code"), data | {"created_by": CODE[0]}, tensors)
    folder("sound")
    names = sorted(p.name for p in top.iterdir())
    lines = child(LIMITED, good, *(top / n for n in names)).splitlines()
    return dict(zip(names, lines, strict=True))


def test_every_folder_gets_one_answer(answers: dict[str, str]) -> None:
    assert all(a == "read" or a.startswith("ProjectionFileError") for a in answers.values()), answers


def test_sound_folders_are_read_whatever_words_they_hold(answers: dict[str, str]) -> None:
    assert answers["sound"] == answers["words"] == "read"
    assert "allowed form" in answers["code"]


@pytest.mark.parametrize("length", HUGE)
def test_a_huge_header_is_not_read(answers: dict[str, str], length: int) -> None:
    assert HUGE[length] in answers[f"header {length}"]


def test_huge_declared_sizes_are_not_allocated(answers: dict[str, str]) -> None:
    assert "bytes of tensors declared; at most" in answers["model"]
    assert "mean_basis has shape" in answers["shapes"]
    assert "truncated or too long" in answers["long"]
    assert "at most" in answers["config"]


def test_the_costliest_json_stays_within_the_limits(answers: dict[str, str]) -> None:
    """Up to four mebibytes of the smallest values there are, in the header and in the config at once."""
    assert "digest" in answers["costly"]
