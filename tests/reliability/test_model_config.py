# SPDX-License-Identifier: Apache-2.0
"""Model folders nobody can serve: damaged, hostile, or with code of their own: one error, and the code never runs."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.projections import write_model
from tests.reliability import LONG
from tests.reliability.folders import HOSTILE, paths, put
from vllm_kqsvd.errors import KQSVDError
from vllm_kqsvd.projection import ModelFingerprint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A sound model folder."""
    return write_model(tmp_path / "m")


def outcome(model: Path) -> str:
    """ "" if the folder has a fingerprint, else the text of the one error."""
    try:
        ModelFingerprint.from_hf(model)
    except KQSVDError as e:
        assert str(e).isprintable() and len(str(e)) < 1000
        return str(e)
    return ""


def test_hostile_values_in_the_config(model: Path) -> None:
    source = (model / "config.json").read_text()
    wanted = {
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_size",
        "model_type",
    }
    every = [(p, v) for p in paths(json.loads(source)) for v in (*HOSTILE, ...) if LONG or p[0] in wanted]
    for place, value in every if LONG else random.Random(1).sample(every, 60):
        data = json.loads(source)
        put(data, place, value)
        try:
            (model / "config.json").write_text(json.dumps(data))
        except ValueError:
            continue  # an integer of more than 4300 digits
        outcome(model)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00", "[" * 100000, '{"model_type": "nobody\x1b[2J"}'])
def test_what_is_no_config(model: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    assert outcome(model)


@pytest.mark.parametrize("known", [True, False])
def test_code_of_a_model_is_not_run(model: Path, known: bool) -> None:
    ran = model / "ran"
    (model / "own.py").write_text(f"open({str(ran)!r}, 'w')\nfrom transformers import LlamaConfig as Own\n")
    data = json.loads((model / "config.json").read_text()) | {"auto_map": {"AutoConfig": "own.Own"}}
    (model / "config.json").write_text(json.dumps(data | ({} if known else {"model_type": "own"})))
    assert known or outcome(model)
    assert not ran.exists()


def test_damaged_weights(model: Path) -> None:
    file = model / "model.safetensors"
    content = file.read_bytes()
    for broken in (b"", content[:100], content[:-1], (2**63).to_bytes(8, "little") + content[8:]):
        file.write_bytes(broken)
        assert "cannot read the model's weights" in outcome(model)
