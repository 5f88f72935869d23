# SPDX-License-Identifier: Apache-2.0
"""8-bit weights beside latents: attention sees what it always sees, and the projection must be the checkpoint's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")

from tests.attention.conftest import engine  # noqa: E402
from tests.attention.models import write_projection, write_quantized  # noqa: E402
from tests.attention.runs import Run, assert_agree, generate, prompt_of  # noqa: E402
from vllm_kqsvd.projection import ModelFingerprint  # noqa: E402

PROMPTS = [*(prompt_of(n, seed=n) for n in (1, 17, 40)), prompt_of(300, seed=9)]
LOSS = 0.15
AMX = torch.cpu._is_amx_tile_supported()
ACTIVATIONS = "bfloat16" if AMX else "float32"  # vLLM's 8-bit kernels for AMX take 16 bits alone
fp8_marks = [
    pytest.mark.skipif(not (torch.cuda.is_available() or AMX), reason="vLLM's fp8 kernels run on GPUs and AMX"),
    pytest.mark.xfail(AMX, reason="answers part by up to 0.48 there, not explained (CHANGELOG)", strict=False),
]


def answers(model: Path, projection: Path | None) -> list[Run]:
    """Greedy runs of an engine that is gone afterwards."""
    with engine(model, projection, dtype=ACTIVATIONS) as llm:
        return generate(llm, PROMPTS)


@pytest.mark.parametrize("dtype", [torch.int8, pytest.param(torch.float8_e4m3fn, marks=fp8_marks)], ids=["int8", "fp8"])
def test_a_quantized_checkpoint(tiny: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    model = write_quantized(tmp_path / "model", tiny / "model", dtype)
    projection = write_projection(tmp_path / "p8", model)
    for a, b in zip(answers(model, None), answers(model, projection), strict=True):
        assert_agree(a, b, LOSS)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
def test_a_projection_belongs_to_the_weights_as_stored(tiny: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    plain = ModelFingerprint.from_hf(tiny / "model")
    quantized = ModelFingerprint.from_hf(write_quantized(tmp_path / "model", tiny / "model", dtype))
    (said,) = plain.differences(quantized)
    assert said.startswith("weights ")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
def test_calibration_expands_the_weights(tiny: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    pytest.importorskip("compressed_tensors")
    from vllm_kqsvd.calibration.capture import load_model

    plain = load_model(str(tiny / "model"), "cpu", torch.float32)
    expanded = load_model(str(write_quantized(tmp_path / "model", tiny / "model", dtype)), "cpu", torch.float32)
    a, b = (m.model.layers[1].self_attn.k_proj.weight for m in (plain, expanded))
    assert b.dtype == torch.float32 and 0 < (a - b).norm() / a.norm() < 0.03
    prompt = torch.tensor([prompt_of(40)])
    assert torch.isfinite(expanded(prompt).logits).all()
