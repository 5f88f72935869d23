# SPDX-License-Identifier: Apache-2.0
"""Commands of the documents are commands that exist: verbs, options, make targets, benchmark modules, test files."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from vllm_kqsvd.cli import make_parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {p.name: p.read_text() for p in PAGES if p.name != "results.md"}  # that one is generated


def code(text: str) -> list[str]:
    """Indented lines and `quoted` pieces, without comments."""
    found = re.findall(r"^    (\S.*)$", text, re.M) + re.findall(r"`([^`\n]+)`", text)
    return [re.split(r"\s+#", line)[0].strip() for line in found]


LINES = sorted({(page, line) for page, text in TEXT.items() for line in code(text)})


@pytest.mark.parametrize(
    ("page", "line"), [x for x in LINES if re.match(r"kqsvd \w+ \S", x[1]) and not re.search(r"\.\.\.|OPTION", x[1])]
)
def test_every_kqsvd_command_parses(page: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(line)[1:]
    try:
        make_parser(words[0]).parse_args(words)
    except SystemExit:
        why = capsys.readouterr().err
        # In a sentence `kqsvd calibrate --basis NAME` names an option and leaves the rest out.
        left_out = re.search(r"arguments are required|one of the arguments|invalid choice: 'NAME'", why)
        if not left_out or len(words) > 3:
            raise AssertionError(f"{page}: {line}\n{why}") from None


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    named = {(page, m[1]) for page, line in LINES if (m := re.match(r"make (\w+)\b", line))}
    assert named and not [x for x in named if x[1] not in targets]


def test_every_module_and_file_exists() -> None:
    for page, text in TEXT.items():
        for module in re.findall(r"python -m ((?:benchmarks|vllm_kqsvd)\.[\w.]+)", text):
            assert find_spec(module.rstrip(".")), f"{page}: {module}"
        for name in re.findall(r"`((?:tests|benchmarks|calibration|vllm_kqsvd|csrc|docs)/[\w./*{}-]+)", text):
            if not re.search(r"[*{}]", name):
                assert (ROOT / name.split("::")[0]).exists(), f"{page}: {name}"
