# SPDX-License-Identifier: Apache-2.0
"""Every refusal names what was asked and what to do instead; engines stop at start-up with that sentence."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")
from tests.attention.conftest import engine  # noqa: E402
from tests.attention.models import write_model, write_projection  # noqa: E402
from vllm_kqsvd.attention import refusals  # noqa: E402
from vllm_kqsvd.attention.backend import BLOCK_SIZE, KQSVDBackend, KQSVDWindowBackend, backend_for  # noqa: E402
from vllm_kqsvd.errors import UnsupportedError  # noqa: E402

LAYER: dict[str, Any] = {
    "head_size": 64, "num_heads": 4, "num_kv_heads": 2, "kv_cache_dtype": "auto", "attn_type": "decoder",
    "alibi_slopes": None, "sinks": None, "kv_sharing_target": None, "extra": {},
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"attn_type": "encoder_only"}, "encoder_only attention"),
        ({"alibi_slopes": [1.0]}, "ALiBi"),
        ({"extra": {"use_alibi_sqrt": True}}, "ALiBi"),
        ({"sinks": torch.zeros(4)}, "attention sinks"),
        ({"kv_sharing_target": "model.layers.0"}, "sharing a cache"),
        ({"kv_cache_dtype": "fp8"}, "set --kv-cache-dtype bfloat16"),
        ({"head_size": 72}, "multiple of 16"),
        ({"extra": {"chunk_lookback": 2}}, "chunk_lookback"),
    ],
)
def test_layers(change: dict[str, object], said: str) -> None:
    assert refusals.layer_refusal(**LAYER) is None
    assert said in (refusals.layer_refusal(**{**LAYER, **change}) or "")


def engine_config(**change: Any) -> Any:
    """The fields of a VllmConfig that `engine_refusal` reads."""
    parts: dict[str, dict[str, Any]] = {
        "model_config": {"use_mla": False, "is_encoder_decoder": False},
        "parallel_config": {"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1},
        "scheduler_config": {"disable_hybrid_kv_cache_manager": False},
    }
    whole: dict[str, Any] = {"speculative_config": None, "kv_transfer_config": None}
    for key, value in change.items():
        home = next((p for p in parts.values() if key in p), whole)
        home[key] = value
    return SimpleNamespace(**{k: SimpleNamespace(**v) for k, v in parts.items()}, **whole)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_mla": True}, "multi-head latent attention"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"decode_context_parallel_size": 2}, "set it to 1"),
        ({"prefill_context_parallel_size": 2}, "set it to 1"),
        ({"kv_transfer_config": SimpleNamespace(kv_connector="NixlConnector")}, "remove --kv-transfer-config"),
        ({"kv_transfer_config": SimpleNamespace(kv_connector="OffloadingConnector")}, "remove --kv-transfer-config"),
        ({"kv_transfer_config": SimpleNamespace(kv_connector="LMCacheConnectorV1")}, "remove --kv-transfer-config"),
        ({"disable_hybrid_kv_cache_manager": True}, "remove the option"),
        ({"speculative_config": SimpleNamespace(method="draft_model")}, "use method 'ngram'"),
        ({"speculative_config": SimpleNamespace(method="eagle3")}, "use method 'ngram'"),
    ],
)
def test_engines(change: dict[str, object], said: str) -> None:
    assert refusals.engine_refusal(engine_config()) is None
    assert said in (refusals.engine_refusal(engine_config(**change)) or "")


def test_more_drafts_than_the_kernels_verify() -> None:
    ops: Any = SimpleNamespace(name="cuda", needs_host_lengths=True, max_decode_len=8)
    assert refusals.draft_refusal(ops, 7) is None
    assert "verify at most 7" in (refusals.draft_refusal(ops, 8) or "")
    assert refusals.draft_refusal(SimpleNamespace(needs_host_lengths=False), 20) is None  # type: ignore[arg-type]


def test_latent_attention_does_not_slip_by_on_the_cpu() -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_kqsvd.plugin import register

    register()
    config = VllmConfig()
    with set_current_vllm_config(config):
        assert AttentionBackendEnum.CPU_MLA.get_class().get_name() == "CPU_MLA"
        assert AttentionBackendEnum.CPU_ATTN.get_class().get_name() == "CPU_ATTN"
        config.attention_config.backend = AttentionBackendEnum.CUSTOM
        assert AttentionBackendEnum.CPU_ATTN.get_class() is KQSVDBackend
        with pytest.raises(UnsupportedError, match="latent already"):
            AttentionBackendEnum.CPU_MLA.get_class()


def test_batch_invariance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert "unset it" in (refusals.engine_refusal(engine_config()) or "")


def test_multimodal_and_dynamic_rope() -> None:
    def model(mrope: bool, kind: str = "default") -> Any:
        text = SimpleNamespace(rope_parameters={"rope_type": kind})
        return SimpleNamespace(uses_mrope=mrope, hf_text_config=text)

    assert refusals.rope_refusal(model(False), {"page"}) is None
    assert "rope mode 'post'" in (refusals.rope_refusal(model(True), {"page", "none"}) or "")
    assert refusals.rope_refusal(model(True), {"post"}) is None
    assert "dynamic RoPE" in (refusals.rope_refusal(model(False, "dynamic"), {"page"}) or "")


def test_what_the_selector_hears() -> None:
    reasons = KQSVDBackend.validate_configuration(
        head_size=72, dtype=torch.bfloat16, kv_cache_dtype="fp8", block_size=48, use_mla=True, has_sink=True,
        use_sparse=True, use_mm_prefix=True, use_per_head_quant_scales=True, device_capability=None,
        attn_type="encoder", has_sliding_window=True, use_non_causal=True, use_batch_invariant=True,
        use_kv_connector=True, use_pcp=True, use_adaptive_verification=True, use_dcp=True, use_rswa=True,
    )  # fmt: skip
    assert len(reasons) >= 16 and "without --attention-backend CUSTOM" in reasons[-1]


def test_preferred_block_size() -> None:
    from vllm.config import VllmConfig
    from vllm.platforms.interface import Platform

    pair = [backend_for(130), KQSVDWindowBackend]  # what vLLM finds in the layer table once weights are loaded
    assert Platform._preferred_block_size_for_backends(pair, 16, VllmConfig()) == BLOCK_SIZE
    assert KQSVDBackend.get_preferred_block_size(16) == BLOCK_SIZE
    assert backend_for(130) is backend_for(130) and backend_for(130).full_cls_name() == KQSVDBackend.full_cls_name()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kqsvd": {"windw": 3}}, "did you mean 'window'"),
        ({"disable_hybrid_kv_cache_manager": True}, "remove the option"),
        ({"block_size": 32}, "--block-size 32 asked for"),
        ({"num_gpu_blocks_override": 9}, "there are 9"),
        ({"kv_cache_dtype": "fp8"}, "set --kv-cache-dtype bfloat16"),
        ({"kv_offloading_size": 1.0}, "remove --kv-transfer-config"),
    ],
)
def test_an_engine_does_not_start(tiny: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(Exception, match=said), engine(tiny / "model", tiny / "p8", **options):
        pass


def test_sliding_window_model_does_not_start(tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    model = write_model(tmp_path / "model", num_hidden_layers=1)
    projection = write_projection(tmp_path / "p", model, layers=1)
    config = MistralConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, sliding_window=128,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(model)
    with pytest.raises(Exception, match="every attention layer"), engine(model, projection):
        pass
