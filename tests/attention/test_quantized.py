# SPDX-License-Identifier: Apache-2.0
"""8-bit weights beside latents: attention sees what it always sees, and the projection must be the checkpoint's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("vllm")

from tests.attention.conftest import engine  # noqa: E402
from tests.attention.models import write_projection, write_quantized  # noqa: E402
from tests.attention.runs import Run, assert_agree, generate, prompt_logprobs, prompt_of  # noqa: E402
from vllm_kqsvd.projection import ModelFingerprint  # noqa: E402

PROMPTS = [*(prompt_of(n, seed=n) for n in (1, 17, 40)), prompt_of(300, seed=9)]
READ = [prompt_of(300, seed=9), prompt_of(300, seed=10), prompt_of(200, seed=11)]
LOSS = 0.15
AMX = torch.cpu._is_amx_tile_supported()
ACTIVATIONS = "bfloat16" if AMX else "float32"  # vLLM's 8-bit kernels for AMX take 16 bits alone


def answers(model: Path, projection: Path | None) -> list[Run]:
    """Greedy runs of an engine that is gone afterwards."""
    with engine(model, projection, dtype=ACTIVATIONS) as llm:
        return generate(llm, PROMPTS)


def logprobs(model: Path, projection: Path | None) -> torch.Tensor:
    """Of every token of `READ`, 64 at a time."""
    with engine(model, projection, dtype=ACTIVATIONS) as llm:
        return torch.tensor([x for prompt in READ for x in prompt_logprobs(llm, prompt)])


def shaken(model: Path, folder: Path) -> Path:
    """The same model with embeddings a thousandth off, at random."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    embeddings = tensors["model.embed_tokens.weight"]
    noise = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(1))
    tensors["model.embed_tokens.weight"] = embeddings * (1 + noise / 1000)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_an_int8_checkpoint(tiny: Path, tmp_path: Path) -> None:
    model = write_quantized(tmp_path / "model", tiny / "model", torch.int8)
    projection = write_projection(tmp_path / "p8", model)
    for a, b in zip(answers(model, None), answers(model, projection), strict=True):
        assert_agree(a, b, LOSS)


@pytest.mark.skipif(not (torch.cuda.is_available() or AMX), reason="vLLM's fp8 kernels run on GPUs and AMX")
def test_an_fp8_checkpoint(tiny: Path, tmp_path: Path) -> None:
    """Activations rounded to fp8 make a large change of the least one, so the model itself says what is little.

    Embeddings a thousandth off move it by 0.15 of log probability, root mean square; latents of
    8 bits by 0.11, of 4 bits by 0.21 (on AMX).
    """
    model = write_quantized(tmp_path / "model", tiny / "model", torch.float8_e4m3fn)
    exact = logprobs(model, None)
    moved = (logprobs(shaken(model, tmp_path / "shaken"), None) - exact).square().mean().sqrt()
    ours = (logprobs(model, write_projection(tmp_path / "p8", model)) - exact).square().mean().sqrt()
    assert ours < moved < 0.3


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
