# SPDX-License-Identifier: Apache-2.0
"""Calibrate a real model, serve it from a compressed KV cache, chat with it, and say what it cost and gained.

    make demo            (or: python -m benchmarks.demo)

SmolLM2-135M-Instruct, dequantized from GGUF, is calibrated on Wikipedia and Python sources, served by vLLM with the
plugin, and compared with its own uncompressed cache on text that was held out. Model, text and projection are kept
under build/ for later runs. The summary is also written to build/demo.json. A GPU is used where there is one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.assets.fetch import BUILD
from benchmarks.assets.models import model_folder
from benchmarks.assets.text import calibration_files, held_out_files
from benchmarks.demo_server import Server
from benchmarks.peak_memory import PeakMemory

ROOT = BUILD.parent
DEMO = BUILD / "demo"
KV_BYTES = 256 << 20
MEMORY_LIMIT = 8 * 10**9  # what the demo may hold on a machine without a GPU
CONTEXT = 2048
SERVE = ["--kv-cache-memory-bytes", str(KV_BYTES), "--max-num-seqs", "8"]
# A few windows are enough to show the way; the command's own default is 64.
CALIBRATE = ["--preset", "balanced", "--num-windows", "8", "--gradient-windows", "4"]
VERIFY = ["--context", str(CONTEXT), "--windows", "1"]
QUESTION = "What is the capital of France, and what is it famous for? Answer in two sentences."


def kqsvd(*arguments: object) -> str:
    """Standard output of the `kqsvd` command; its progress stays visible. A failure ends the demo."""
    command = [sys.executable, "-m", "vllm_kqsvd.cli", *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def projection_key() -> str:
    """Changes with whatever a projection is made from: the calibrator, the codec, the options."""
    digest = hashlib.sha256(" ".join(CALIBRATE).encode())
    for folder in ("calibration", "vllm_kqsvd"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def projection(model: Path) -> Path:
    """The projection folder, calibrated unless an equal one is there."""
    folder = DEMO / f"projection-{projection_key()}"
    if not folder.exists():
        for old in DEMO.glob("projection-*"):
            shutil.rmtree(old)
        kqsvd("calibrate", model, "--output", folder, *CALIBRATE, "--data", *calibration_files())
    return folder


def has_gpu() -> bool:
    """Whether calibration, verification and both servers run on a GPU."""
    import torch

    return torch.cuda.is_available()


def eager() -> list[str]:
    """On a CPU, compiling the model would take longer than the whole chat."""
    return [] if has_gpu() else ["--enforce-eager"]


def chat(server: Server) -> tuple[str, str]:
    """One reply at once and one streamed, through the OpenAI client."""
    from openai import OpenAI

    client = OpenAI(base_url=server.url + "/v1", api_key="none", timeout=300)
    request = {
        "model": client.models.list().data[0].id,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 64,
        "temperature": 0.0,
    }
    reply = client.chat.completions.create(**request).choices[0].message.content
    pieces = client.chat.completions.create(**request, stream=True)
    streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    return reply, streamed


def step(text: str) -> None:
    print(f"== {text}", flush=True)


def main() -> None:
    with PeakMemory() as memory:
        summary, report, streamed = demo()
    summary["peak_memory_gb"] = round(memory.bytes / 1e9, 2)
    (BUILD / "demo.json").write_text(json.dumps(summary, indent=2) + "\n")
    print_summary(summary, report, streamed)
    if memory.bytes > MEMORY_LIMIT and not has_gpu():
        sys.exit(f"the demo held more than {MEMORY_LIMIT / 1e9:.0f} GB")


def demo() -> tuple[dict, str, str]:
    """Run everything; returns the summary, the plugin's boot report and the streamed reply."""
    start = time.monotonic()
    DEMO.mkdir(parents=True, exist_ok=True)
    step("model and text")
    model, texts = model_folder("smollm2-135m"), held_out_files()
    step("calibrate")
    folder = projection(model)
    step("verify on held-out text")
    fidelity = json.loads(kqsvd("verify", model, folder, "--json", *VERIFY, "--data", *texts))
    step("vllm serve, as it is")
    with Server(model, [*SERVE, *eager(), "--load-format", "dummy"], DEMO / "plain.log") as server:
        kv_tokens_bf16 = server.kv_tokens()
    step("vllm serve, with the plugin")
    options = json.dumps({"kqsvd": {"projection": str(folder)}})
    plugin = ["--attention-backend", "CUSTOM", "--additional-config", options]
    with Server(model, [*SERVE, *eager(), *plugin], DEMO / "kqsvd.log") as server:
        kv_tokens, report = server.kv_tokens(), server.boot_report()
        reply, streamed = chat(server)
    summary = {
        "kv_tokens": kv_tokens,
        "kv_tokens_bf16": kv_tokens_bf16,
        "compression_ratio": round(kv_tokens / kv_tokens_bf16, 3),
        "kl": fidelity["kl"],
        "perplexity": fidelity["perplexity"],
        "perplexity_bf16": fidelity["perplexity_exact"],
        "seconds": round(time.monotonic() - start, 1),
        "reply": reply,
    }
    return summary, report, streamed


def print_summary(summary: dict, report: str, streamed: str) -> None:
    change = summary["perplexity"] / summary["perplexity_bf16"] - 1
    print(f"""
{report}

SmolLM2-135M-Instruct (dequantized from GGUF), {KV_BYTES >> 20} MiB of KV cache
  KV tokens          {summary["kv_tokens"]:,} with the plugin, {summary["kv_tokens_bf16"]:,} without, vLLM's own count
  compression ratio  {summary["compression_ratio"]:.2f} (codes, scales, exact windows and padding counted)
  KL                 {summary["kl"]:.4f} nats per token against the uncompressed cache on held-out text
  perplexity         {summary["perplexity"]:.3f}, uncompressed {summary["perplexity_bf16"]:.3f} ({change:+.2%})
  asked              {QUESTION}
  reply              {summary["reply"]}
  streamed           {"the same" if streamed == summary["reply"] else streamed}
  peak memory        {summary["peak_memory_gb"]:.1f} GB, everything the demo ran at once
  seconds            {summary["seconds"]}; also in build/demo.json""")


if __name__ == "__main__":
    main()
