# SPDX-License-Identifier: Apache-2.0
"""The hook that collects a served model's log-probabilities, and the answers as they come out of an engine."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks.fidelity_engine import Rows, answer


@pytest.mark.parametrize("computed", [15, 16])  # rows for a prompt of 16 tokens, by version of the runner
def test_rows_after_the_first_scored_token(computed):
    logits = torch.randn(16, 7)
    rows = Rows()
    rows.start(6)
    for at in range(0, computed, 4):
        rows(None, (), logits[at : min(at + 4, computed)])
        rows(None, (), torch.randn(1, 7))  # what the sampler asks for
    assert torch.equal(rows.result(16), logits[6:15].log_softmax(-1))


def test_missing_rows_stop_the_measurement():
    rows = Rows()
    rows.start(0)
    rows(None, (), torch.randn(8, 7))
    with pytest.raises(SystemExit, match="8 rows"):
        rows.result(16)


class Engine:
    """Finishes its requests last first, one a step, under the names they were given."""

    def __init__(self, lost: int = 0) -> None:
        self.requests, self.lost, self.llm_engine = [], lost, self

    def enqueue(self, prompts, params, use_tqdm):
        self.requests = list(enumerate(prompts))[self.lost :]
        return [f"{i}-abc" for i in range(len(prompts))]

    def has_unfinished_requests(self):
        return bool(self.requests)

    def step(self):
        number, prompt = self.requests.pop()
        done = SimpleNamespace(request_id=str(number), finished=True, outputs=[SimpleNamespace(text=prompt.upper())])
        return [SimpleNamespace(request_id=str(number), finished=False), done]


def test_answers_belong_to_their_prompts(tmp_path):
    pytest.importorskip("vllm")
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text(
        "".join(json.dumps({"id": f"t{i}", "prompt": f"p{i}", "max_tokens": 4}) + "\n" for i in range(3))
    )
    answer(Engine(), prompts, answers)
    found = [json.loads(line) for line in answers.read_text().splitlines()]
    assert found == [{"id": f"t{i}", "answer": f"P{i}"} for i in (2, 1, 0)]
    with pytest.raises(SystemExit, match="1 of 3 prompts"):
        answer(Engine(lost=1), prompts, answers)
    assert len(answers.read_text().splitlines()) == 2
