# SPDX-License-Identifier: Apache-2.0
"""One KV-cache format as vLLM serves it, against the model's exact float32 pass and the offline harness.

    python -m benchmarks.fidelity_engine MODEL --data FILE... --cache fp8            # a cache dtype of vLLM's own
    python -m benchmarks.fidelity_engine MODEL --data FILE... --projection DIR       # ours

vLLM reads each window in steps of `--chunk` tokens and scores it (prompt log-probabilities, full vocabulary): every
step but the first reads the compressed cache. The same windows go through the offline harness with the same reading
rule. `--prompts FILE` then answers the prompts of `benchmarks.fidelity_tasks` with the same engine; without `--data` it
does only that. Rows are appended to benchmarks/results/fidelity.csv, method "NAME (vLLM)" and "NAME (offline)". A run
that is stopped keeps the rows of its finished texts and its finished answers.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections import defaultdict
from pathlib import Path

import torch

from benchmarks.fidelity import RESULTS, append, peer_codecs, table_row
from vllm_kqsvd.projection import load_projection
from vllm_kqsvd.verify import load_model, projection_codec
from vllm_kqsvd.verify_harness import ReadRule, Reference, Score, Window, compare, score
from vllm_kqsvd.verify_result import Fidelity
from vllm_kqsvd.verify_text import read_text, text_windows

GIB = 2**30


class Rows:
    """Forward hook on the logits processor: keeps the log-probabilities that predict tokens `first` + 1 and on."""

    def __init__(self) -> None:
        self.first, self.seen, self.rows = 0, 0, []

    def start(self, first: int) -> None:
        """Forget everything; a new prompt begins."""
        self.first, self.seen, self.rows = first, 0, []

    def __call__(self, module, args, out: torch.Tensor) -> None:
        """Single rows sample, several score the prompt."""
        if out.ndim != 2 or out.shape[0] < 2:
            return
        begin, self.seen = self.seen, self.seen + out.shape[0]
        if self.seen > self.first:
            self.rows.append(out[max(0, self.first - begin) :].float().log_softmax(-1))

    def result(self, tokens: int) -> torch.Tensor:
        """[tokens - 1 - first, vocabulary]; some versions also compute the row after the last token."""
        if self.seen not in (tokens - 1, tokens):
            raise SystemExit(f"{self.seen} rows of logits seen, {tokens} expected; choose another --context")
        return torch.cat(self.rows)[: tokens - 1 - self.first]


def make_engine(options):
    """vLLM's offline engine in this process, so that the hook sees its logits."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM

    ours = options.projection is not None
    kqsvd = {"projection": str(options.projection.resolve()), "window": options.window} if ours else {}
    cuda = options.device.startswith("cuda")
    return LLM(
        str(options.model),
        dtype=options.served_dtype,
        max_model_len=options.max_model_len,
        max_num_batched_tokens=options.batched_tokens,
        enforce_eager=True,
        enable_prefix_caching=False,
        seed=0,
        async_scheduling=False,
        block_size=options.block_size if ours else None,
        **(
            {"kv_cache_memory_bytes": options.cache_gib * GIB, "gpu_memory_utilization": 0.15}
            if cuda
            else {"max_num_seqs": 4}
        ),
        **({"attention_backend": "CUSTOM", "additional_config": {"kqsvd": kqsvd}} if ours else {}),
        **({} if ours else {"kv_cache_dtype": options.cache}),
    )


def served_rows(llm, windows: list[Window], chunk: int, rows: Rows):
    """Log-probabilities of every window, read `chunk` tokens at a time."""
    from vllm import SamplingParams

    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    usual, scheduler.max_num_scheduled_tokens = scheduler.max_num_scheduled_tokens, chunk
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
    for window in windows:
        rows.start(window.first_scored)
        llm.generate({"prompt_token_ids": window.tokens.tolist()}, params, use_tqdm=False)
        yield rows.result(window.tokens.numel())
    rows.start(1 << 62)  # keep nothing of what follows
    scheduler.max_num_scheduled_tokens = usual


def answer(llm, prompts: Path, out: Path) -> None:
    """Greedy answers to the prompts (JSON lines with id, prompt, max_tokens, stop), a line as each is finished."""
    from vllm import SamplingParams

    tasks = [json.loads(line) for line in prompts.read_text().splitlines()]
    params = [SamplingParams(temperature=0.0, max_tokens=t["max_tokens"], stop=t.get("stop")) for t in tasks]
    began = time.monotonic()
    asked = llm.enqueue([t["prompt"] for t in tasks], params, use_tqdm=False)
    waiting = {request.partition("-")[0]: task["id"] for request, task in zip(asked, tasks, strict=True)}
    with out.open("w", buffering=1) as f:
        while llm.llm_engine.has_unfinished_requests():
            for done in llm.llm_engine.step():
                if done.finished:
                    task = waiting.pop(done.request_id.partition("-")[0])
                    f.write(json.dumps({"id": task, "answer": done.outputs[0].text}) + "\n")
    if waiting:
        raise SystemExit(f"{len(waiting)} of {len(tasks)} prompts have no answer")
    print(f"{len(tasks)} answers in {time.monotonic() - began:.1f} s", flush=True)


def offline_codec(options, num_layers: int):
    """The harness's codec of the served format, its bits per element and its name."""
    if options.projection is not None:
        folder = load_projection(options.projection)
        return (
            projection_codec(folder, options.device, options.projection.name),
            16 / folder.compression_ratio(),
            folder,
        )
    codecs = peer_codecs(num_layers, None, options.device)
    return codecs["bf16" if options.cache == "auto" else options.cache], None, None


def main() -> None:
    """Exact and offline passes first, then the engine; rows after every text."""
    options = parse()
    began = time.monotonic()

    def say(what: str) -> None:
        print(f"[{time.monotonic() - began:.1f} s] {what}", flush=True)

    measured = measure_exactly(options, say) if options.data else None
    llm = make_engine(options)
    say("engine ready")
    if measured:
        served(options, llm, *measured, say)
    if options.prompts:
        answer(llm, options.prompts, options.answers)
    say("done")


def measure_exactly(options, say):
    """The windows, each one's exact log-probabilities and offline score; codec, its bits, folder and reading rule."""
    model, tokenizer = load_model(options.model, options.device, torch.float32)
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    codec, bits, folder = offline_codec(options, config.num_hidden_layers)
    bits = bits or codec.bits(head_dim)
    rule = ReadRule(options.window if folder else 0, 0, options.chunk, 0)
    windows = [
        window
        for context in options.context
        for path in options.data
        for window in text_windows(
            read_text(path), path.stem, tokenizer, context, options.windows, options.scored or context // 4
        )
    ]
    exact, offline = [], []
    for window in windows:
        reference = Reference(model, window)
        exact.append(reference.logprobs)
        offline.append(score(model, window, reference, codec, rule) if options.offline else None)
        del reference
    del model
    gc.collect()
    if options.device.startswith("cuda"):
        torch.cuda.empty_cache()
    say(f"{len(windows)} windows scored exactly and offline")
    return windows, exact, offline, (codec, bits, folder, rule)


def served(options, llm, windows, exact, offline, how_offline, say) -> None:
    """Score the windows as the engine reads them; rows are appended when a text's windows are done."""
    codec, bits, folder, rule = how_offline
    rows = Rows()
    llm.apply_model(lambda model: model.logits_processor.register_forward_hook(rows) and None)
    found: dict[str, list[Score]] = defaultdict(list)
    keys = [(window.tokens.numel(), window.text) for window in windows]
    got = served_rows(llm, windows, options.chunk, rows)
    for i, (window, wanted, one, log_probabilities) in enumerate(zip(windows, exact, offline, got, strict=True)):
        there = log_probabilities.to(wanted.device)
        found["vLLM"].append(compare(wanted, there, window.tokens[window.first_scored + 1 :]))
        if one is not None:
            found["offline"].append(one)
        if keys[i + 1 : i + 2] == [keys[i]]:
            continue
        options.context, text = keys[i]
        table = []
        for how, scores in found.items():
            served = "" if options.served_dtype == "bfloat16" else f", {options.served_dtype}"
            figures, method = Fidelity.of(text, scores), f"{codec.name} ({how}{served})"
            say(f"{options.context} {method} {figures.row()}")
            row = table_row(figures, options, method, bits, "class" if folder else 0, rule, folder, "fidelity_engine")
            row["versions"] += f"; served in {options.served_dtype}"
            table.append(row)
        append(table, options.output)
        found.clear()


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="held-out text files (none: only answers)")
    served = parser.add_mutually_exclusive_group(required=True)
    served.add_argument("--cache", help="a --kv-cache-dtype of vLLM (auto: 16 bits)")
    served.add_argument("--projection", type=Path, help="serve through this projection folder")
    parser.add_argument("--context", type=int, nargs="+", default=[2048])
    parser.add_argument("--scored", type=int, help="last tokens of a window that are scored (default: a quarter)")
    parser.add_argument("--windows", type=int, default=2, help="windows per text")
    parser.add_argument("--window", type=int, default=64, help="exact recent tokens of ours")
    parser.add_argument("--chunk", type=int, default=64, help="tokens per step")
    parser.add_argument("--no-offline", dest="offline", action="store_false", help="leave the harness out")
    parser.add_argument("--served-dtype", default="bfloat16", help="of the served model")
    parser.add_argument("--max-model-len", type=int, default=16384)
    parser.add_argument("--batched-tokens", type=int, default=8192)
    parser.add_argument("--block-size", type=int, help="of ours (default: the plugin's)")
    parser.add_argument("--cache-gib", type=int, default=10, help="GPU memory for the cache")
    parser.add_argument("--prompts", type=Path, help="JSON lines of prompts to answer as well")
    parser.add_argument("--answers", type=Path, help="where the answers go")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not (options.data or options.prompts):
        parser.error("nothing to do: give --data, --prompts or both")
    if options.prompts and not options.answers:
        parser.error("--prompts needs --answers FILE")
    return options


if __name__ == "__main__":
    main()
