# SPDX-License-Identifier: Apache-2.0
"""Work splits by step, and workers' sums are the sums of one run. Ray itself is not started here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from vllm_kqsvd.calibration.capture import load_model
from vllm_kqsvd.calibration.collect import CollectOptions, Collector, draw_labels
from vllm_kqsvd.calibration.corpus import Corpus
from vllm_kqsvd.calibration.distributed import _from_bytes, _to_bytes, _worker, share
from vllm_kqsvd.calibration.model_probe import probe

SMALL = CollectOptions(num_windows=4, window_length=128, gradient_windows=2, gradient_length=96, samples=200, window=32)


@pytest.mark.parametrize(("steps", "workers"), [(7, 2), (3, 5), (8, 4), (1, 1)])
def test_share_covers_every_step_once(steps: int, workers: int) -> None:
    parts = share(range(steps), workers)
    assert [s for p in parts for s in p] == list(range(steps))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_workers_add_up_to_one_run(llama: Path, text_file: Path) -> None:
    model = load_model(str(llama), "cpu", torch.float32)
    corpus = Corpus([text_file], AutoTokenizer.from_pretrained(llama), SMALL.window_length)
    collector = Collector(model, probe(model), corpus, SMALL)
    start = _to_bytes(collector.start({}))
    total = _from_bytes(start, "cpu")
    for steps in share(range(collector.num_steps), 2):
        total.merge(_from_bytes(_worker(str(llama), [str(text_file)], SMALL, start, steps, "cpu"), "cpu"))
    whole = collector.run(_from_bytes(start, "cpu"), range(collector.num_steps))
    assert total.steps_done == whole.steps_done == collector.num_steps
    for mine, theirs in zip(total.layers, whole.layers, strict=True):
        assert torch.equal(mine.tokens("k"), theirs.tokens("k"))
        for name, value in theirs.sums.items():
            assert torch.allclose(mine.sums[name], value, rtol=1e-10, atol=1e-12), name


def test_labels_follow_the_distribution() -> None:
    p = torch.tensor([0.5, 0.0, 0.3, 0.2])
    labels = draw_labels(p.expand(20_000, -1), torch.Generator().manual_seed(1))
    assert torch.allclose(labels.bincount(minlength=4) / 20_000, p, atol=0.015)
