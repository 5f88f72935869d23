# SPDX-License-Identifier: Apache-2.0
"""The hook that collects a served model's log-probabilities, with and without a row after the last token."""

from __future__ import annotations

import pytest
import torch

from benchmarks.fidelity_engine import Rows


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
