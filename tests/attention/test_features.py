# SPDX-License-Identifier: Apache-2.0
"""vLLM's request features beside the plugin: LoRA, structured output, logprobs, n > 1, priorities, new weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.attention.conftest import engine
from tests.attention.models import write_adapter
from tests.attention.runs import Run, assert_agree, generate, prompt_of

LOSS = 0.15
PROMPT, LONG = prompt_of(30, seed=3), prompt_of(200, seed=9)
OPTIONS: dict[str, Any] = {
    "enable_lora": True,
    "max_lora_rank": 8,
    "scheduling_policy": "priority",
    "max_num_seqs": 8,
}


def adapted(llm: Any, adapter: Path) -> list[Run]:
    """Greedy runs under the adapter."""
    from vllm.lora.request import LoRARequest

    return generate(llm, [PROMPT, LONG], lora_request=LoRARequest("random", 1, str(adapter)))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter on disk."""
    return write_adapter(tmp_path_factory.mktemp("adapter") / "lora")


@pytest.fixture(scope="module")
def native(tiny: Path, adapter: Path) -> tuple[list[Run], list[Run]]:
    """vLLM's own answers, without and with the adapter."""
    with engine(tiny / "model", None, **OPTIONS) as llm:
        return generate(llm, [PROMPT, LONG]), adapted(llm, adapter)


@pytest.fixture(scope="module")
def llm(tiny: Path, native: object) -> Iterator[Any]:
    """The plugin."""
    with engine(tiny / "model", tiny / "p8", **OPTIONS) as made:
        yield made


def test_lora(llm: Any, native: tuple[list[Run], list[Run]], adapter: Path) -> None:
    plain, changed = native
    assert plain[0].tokens != changed[0].tokens
    for a, b in zip(changed, adapted(llm, adapter), strict=True):
        assert_agree(a, b, LOSS)
    again = generate(llm, [PROMPT, LONG])  # latents of one adapter are no prefix of another
    assert again[1].cached in (0, 128)
    for a, b in zip(plain, again, strict=True):
        assert_agree(a, b, LOSS)


def test_several_samples(llm: Any) -> None:
    from vllm import SamplingParams

    greedy = generate(llm, [LONG])[0]
    sampling = SamplingParams(n=3, temperature=1, top_k=1, max_tokens=8, ignore_eos=True, logprobs=2)
    same = llm.generate([{"prompt_token_ids": LONG}], sampling, use_tqdm=False)[0]
    for i in range(3):  # chunks and prefix hits end elsewhere, and with them the exact window
        assert_agree(greedy, Run.of(same, i), LOSS)
    sampling = SamplingParams(n=3, temperature=2, max_tokens=8, ignore_eos=True, logprobs=1)
    varied = llm.generate([{"prompt_token_ids": LONG}], sampling, use_tqdm=False)[0].outputs
    assert len({tuple(o.token_ids) for o in varied}) == 3  # no seed: vLLM takes none on CPUs
    assert all(-100 < o.cumulative_logprob < 0 for o in varied)


def test_structured_output(llm: Any) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    choices = ["w5", "w9", "w77"]
    sampling = SamplingParams(temperature=0, max_tokens=8, structured_outputs=StructuredOutputsParams(choice=choices))
    prompts: list[Any] = [{"prompt_token_ids": PROMPT}, {"prompt_token_ids": LONG}]
    for output in llm.generate(prompts, sampling, use_tqdm=False):
        assert output.outputs[0].text.strip() in choices


def test_priorities(llm: Any) -> None:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    for n in range(20):
        prompt: Any = {"prompt_token_ids": prompt_of(40 + n, seed=n)}
        llm.llm_engine.add_request(str(n), prompt, sampling, priority=20 - n)
    finished = []
    while llm.llm_engine.has_unfinished_requests():
        finished += [o.request_id for o in llm.llm_engine.step() if o.finished]
    first, last = {int(x.split("-")[0]) for x in finished[:8]}, {int(x.split("-")[0]) for x in finished[-4:]}
    assert first == set(range(12, 20)) and last == set(range(4))


def test_weights_reloaded(llm: Any, native: tuple[list[Run], list[Run]]) -> None:
    llm.collective_rpc("reload_weights")
    llm.reset_prefix_cache()
    for a, b in zip(native[0], generate(llm, [PROMPT, LONG]), strict=True):
        assert_agree(a, b, LOSS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_sleep_and_wake(tiny: Path) -> None:
    """vLLM refuses sleep mode on CPUs. Level 2 drops the weights too."""
    llm: Any
    options = {"enforce_eager": False, "dtype": "bfloat16", "gpu_memory_utilization": 0.1}
    with engine(tiny / "model", tiny / "p4", enable_sleep_mode=True, **options) as llm:
        before = generate(llm, [PROMPT, LONG])
        llm.sleep(level=1)
        llm.wake_up()
        llm.reset_prefix_cache()
        assert [r.tokens for r in generate(llm, [PROMPT, LONG])] == [r.tokens for r in before]
        llm.sleep(level=2)
        llm.wake_up(tags=["weights"])
        llm.collective_rpc("reload_weights")
        llm.wake_up(tags=["kv_cache"])
        llm.reset_prefix_cache()
        assert [r.tokens for r in generate(llm, [PROMPT, LONG])] == [r.tokens for r in before]
