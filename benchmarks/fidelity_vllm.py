# SPDX-License-Identifier: Apache-2.0
"""KL through vLLM itself, against vLLM's own backend, beside the offline harness on the same tokens.

    python -m benchmarks.fidelity_vllm MODEL PROJECTION --data FILE... [--context 2048] [--chunk 64] [--decode 128]

Two measurements, full vocabulary: *prompt* reads the whole context in steps of `--chunk` tokens (prompt
log-probabilities; later chunks read the compressed cache), *decode* samples tokens one at a time after an exactly
prefilled prompt. Logits are taken by a forward hook on the model's logits processor, each engine in a process of its
own. Exit code 1 if the two ways differ by more than `--tolerance`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.fidelity import RESULTS, append, table_row
from vllm_kqsvd.verify_harness import Score

ARMS = ("prompt", "decode", "native")


def run_engine(arm: str, job: dict, folder: Path) -> None:
    """Serve one arm in this process; writes `arm`.pt: log-probabilities per window (and sampled tokens)."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    ours = arm != "native"
    step = job["chunk"] if arm == "prompt" else job["context"]
    llm = LLM(
        job["model"],
        dtype=job["dtype"],
        max_model_len=job["context"] + 16,
        max_num_batched_tokens=step,
        max_num_seqs=1,
        block_size=job["block_size"] if ours else None,
        enforce_eager=True,
        enable_prefix_caching=False,
        seed=0,
        async_scheduling=False,
        **({"attention_backend": "CUSTOM", "additional_config": {"kqsvd": job["kqsvd"]}} if ours else {}),
    )
    seen: list[torch.Tensor] = []

    def keep(module, args, out) -> None:
        seen.append(out.to("cpu", torch.float32, copy=True))

    def install(model) -> None:
        model.logits_processor.register_forward_hook(keep)

    llm.apply_model(install)
    prompts = torch.load(folder / "prompts.pt") if arm == "native" else torch.load(folder / "windows.pt")
    out = []
    for tokens, first in prompts:
        seen.clear()
        if arm == "decode":
            params = SamplingParams(max_tokens=job["decode"] + 1, temperature=1.0, seed=0, ignore_eos=True)
            done = llm.generate({"prompt_token_ids": tokens[:first].tolist()}, params, use_tqdm=False)
            text = torch.cat((tokens[:first], torch.tensor(list(done[0].outputs[0].token_ids))))
            rows = torch.cat(seen)
            check(rows, job["decode"] + 1)
            out.append((text, first, rows[1:].log_softmax(-1)))  # row 0 belongs to the exact prompt
        else:
            params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
            llm.generate({"prompt_token_ids": tokens.tolist()}, params, use_tqdm=False)
            rows = torch.cat([x for x in seen if x.shape[0] > 1])  # single rows sample, several score the prompt
            check(rows, tokens.numel() - 1)
            out.append((tokens, first, rows[first:].log_softmax(-1)))
    torch.save(out, folder / f"{arm}.pt")


def check(rows: torch.Tensor, want: int) -> None:
    """Exit unless the engine computed as many rows of logits as the measurement assumes."""
    if rows.shape[0] != want:
        raise SystemExit(f"{rows.shape[0]} rows of logits seen, {want} expected; choose another --context")


def launch(arm: str, job: dict, folder: Path) -> list:
    """Run an arm in a fresh process and load what it wrote."""
    command = [sys.executable, "-m", "benchmarks.fidelity_vllm", "--arm", arm, json.dumps(job), str(folder)]
    subprocess.run(command, check=True)
    return torch.load(folder / f"{arm}.pt")


def main() -> int:
    """Run the engines and the harness, print both, append rows."""
    if sys.argv[1:2] == ["--arm"]:
        run_engine(sys.argv[2], json.loads(sys.argv[3]), Path(sys.argv[4]))
        return 0
    from vllm_kqsvd.projection import load_projection
    from vllm_kqsvd.verify import load_model, projection_codec
    from vllm_kqsvd.verify_harness import ReadRule, Reference, Window, compare, score
    from vllm_kqsvd.verify_result import Fidelity
    from vllm_kqsvd.verify_text import read_text, text_windows

    options = parse()
    projection = load_projection(options.projection)
    model, tokenizer = load_model(options.model, "cpu", torch.float32)
    windows = []
    for path in options.data:
        text = read_text(path)
        windows += text_windows(text, path.stem, tokenizer, options.context, options.windows, options.context // 4)
    job = {
        "model": str(options.model),
        "kqsvd": {"projection": str(options.projection.resolve()), "window": options.window},
        "context": options.context,
        "chunk": options.chunk,
        "decode": options.decode,
        "dtype": options.dtype,
        "block_size": options.block_size,
    }
    found: dict[tuple[str, str], tuple[list[Score], list[Score]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save([(w.tokens, w.first_scored) for w in windows], folder / "windows.pt")
        ours = {mode: launch(mode, job, folder) for mode in options.modes}
        prompts = [(text, first) for mode in options.modes for text, first, _ in ours[mode]]
        torch.save(prompts, folder / "prompts.pt")
        native = iter(launch("native", job, folder))
    codec = projection_codec(projection)
    for mode in options.modes:
        for window, (tokens, first, rows) in zip(windows, ours[mode], strict=True):
            exact = next(native)[2]
            through = compare(exact[: rows.shape[0]], rows[: exact.shape[0]], tokens[first + 1 :])
            chunk, prefill = (options.chunk, 0) if mode == "prompt" else (1, first)
            piece = Window(tokens, window.text, first)
            rule = ReadRule(options.window, 0, chunk, prefill)
            offline = score(model, piece, Reference(model, piece), codec, rule)
            both = found.setdefault((window.text, mode), ([], []))
            both[0].append(through)
            both[1].append(offline)
    worst, table = 0.0, []
    for (text, mode), (through, offline) in found.items():
        one, two = Fidelity.of(text, through), Fidelity.of(text, offline)
        apart = one.kl / two.kl - 1
        worst = max(worst, abs(apart))
        print(f"{mode:<7} vLLM    {one.row()}\n{mode:<7} offline {two.row()}\n{mode:<7} differ by {apart:+.1%}")
        chunk = options.chunk if mode == "prompt" else 1
        rule = ReadRule(options.window, 0, chunk)
        for figures, how in ((one, "vLLM"), (two, "offline")):
            bits = 16 / projection.compression_ratio()
            method = f"{options.projection.name} ({mode}, {how})"
            table.append(table_row(figures, options, method, bits, "class", rule, projection, "fidelity_vllm"))
    append(table, options.output)
    return int(worst > options.tolerance)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("projection", type=Path)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="held-out text files")
    parser.add_argument("--modes", nargs="+", default=["prompt", "decode"], choices=("prompt", "decode"))
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=1, help="windows per text")
    parser.add_argument("--window", type=int, default=64, help="exact recent tokens")
    parser.add_argument("--chunk", type=int, default=64, help="tokens per prefill step")
    parser.add_argument("--decode", type=int, default=128, help="tokens sampled per window")
    parser.add_argument("--dtype", default="float32", help="of the served model")
    parser.add_argument("--block-size", type=int, default=256, help="of ours; float32 windows need large blocks")
    parser.add_argument("--tolerance", type=float, default=0.15)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.device = "cpu"
    return options


if __name__ == "__main__":
    sys.exit(main())
