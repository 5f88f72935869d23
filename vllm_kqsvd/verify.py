# SPDX-License-Identifier: Apache-2.0
"""`kqsvd verify`: how far a model strays from itself when it reads its KV cache through a projection folder.

The fast offline check: no server, one forward pass per text window, real quantizer, exact recent window and
class-bit sinks as in serving. benchmarks/fidelity_vllm.py measures the same through vLLM.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_kqsvd.checkpoint import loading_options
from vllm_kqsvd.errors import ConfigError
from vllm_kqsvd.projection import Projection, load_projection
from vllm_kqsvd.verify_harness import ProjectionCodec, ReadRule, Score, run_windows
from vllm_kqsvd.verify_result import Fidelity, VerifyResult, default_threshold, plot
from vllm_kqsvd.verify_text import file_digests, read_text, text_windows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `kqsvd verify`."""
    parser.add_argument("model", type=Path, help="Hugging Face model folder")
    parser.add_argument("projection", type=Path, help="projection folder written by `kqsvd calibrate`")
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="FILE", help="held-out text files")
    parser.add_argument("--context", type=int, default=2048, help="tokens per window (default %(default)s)")
    parser.add_argument("--scored", type=int, help="last tokens of a window that are scored (default: a quarter)")
    parser.add_argument("--windows", type=int, default=2, help="windows per file (default %(default)s)")
    parser.add_argument(
        "--window",
        type=int,
        default=64,
        help="recent tokens kept exact, as served (default %(default)s)",
    )
    parser.add_argument(
        "--chunk",
        type=int,
        default=0,
        help="imitate prefill in steps of so many tokens (default: exact prompt, then decode)",
    )
    parser.add_argument("--threshold", type=float, help="largest mean KL that passes (default: by bits)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="write a plot of per-token KL and logit error")


def run(args: argparse.Namespace) -> int:
    """Entry point of the command: 0 if the KL is within the threshold, 1 if not."""
    result, _ = verify(
        args.model,
        args.projection,
        args.data,
        context=args.context,
        scored=args.scored,
        windows=args.windows,
        window=args.window,
        chunk=args.chunk,
        threshold=args.threshold,
        device=args.device,
        dtype=getattr(torch, args.dtype),
        plot_to=args.plot,
    )
    print(json.dumps(result.to_json(), indent=2) if args.json else result.table())
    return 0 if result.passed else 1


def verify(
    model_dir: Path | str,
    projection: Path | str,
    data: Sequence[Path | str],
    *,
    context: int = 2048,
    scored: int | None = None,
    windows: int = 2,
    window: int = 64,
    chunk: int = 0,
    threshold: float | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    plot_to: Path | None = None,
) -> tuple[VerifyResult, list[Score]]:
    """Measure the projection folder on held-out text; also returns the raw per-window scores.

    `data`: text files not used in calibration (refused if their digest is in the folder). The last `scored` of
    every window's `context` tokens are predicted. `chunk` 0: the tokens before them are prefilled exactly and
    the scored ones decoded one at a time; c > 0: everything in steps of c tokens. `window`: exact recent tokens.
    Raises ConfigError for unusable text or settings, ProjectionFileError for a bad or foreign folder.
    """
    folder = load_projection(projection)
    folder.check_model(model_dir)
    texts = _held_out([Path(p) for p in data], folder)
    model, tokenizer = load_model(Path(model_dir), device, dtype)
    scored = scored or context // 4
    pieces = [w for name, text in texts.items() for w in text_windows(text, name, tokenizer, context, windows, scored)]
    rule = ReadRule(window, chunk=chunk or 1, prefill=0 if chunk else context - scored)
    codec = projection_codec(folder, device)
    by_text: dict[str, list[Score]] = defaultdict(list)
    for piece, _, one in run_windows(model, pieces, {"": (codec, rule)}):
        by_text[piece.text].append(one)
    every = [s for scores in by_text.values() for s in scores]
    bits = 16 / folder.compression_ratio()
    old, near = context - min(window, context), min(window, context)
    result = VerifyResult(
        str(model_dir),
        str(projection),
        context,
        window,
        rule.chunk,
        bits,
        16 / bits,
        16 * context / (bits * (old + near) + 16 * near),
        threshold if threshold is not None else default_threshold(bits),
        Fidelity.of("all", every),
        [Fidelity.of(name, scores) for name, scores in by_text.items()],
        {i: sum(s.logit_error[i] for s in every) / len(every) for i in every[0].logit_error},
        dict(zip(sorted(folder.layers), folder.predicted, strict=False)),
        folder.layer_bits,
    )
    if plot_to:
        plot(
            result,
            {name: torch.cat([s.kl for s in scores]) for name, scores in by_text.items()},
            plot_to,
        )
    return result, every


def projection_codec(folder: Projection, device: str = "cpu", name: str = "kqsvd") -> ProjectionCodec:
    """The folder's codecs by layer index, on `device`."""
    return ProjectionCodec({i: entry.codec.to(device) for i, entry in folder.layers.items()}, name)


def _held_out(paths: Sequence[Path], folder: Projection) -> dict[str, str]:
    """Text of every file by name; ConfigError for a file the folder was calibrated on."""
    texts = {path.name: read_text(path) for path in paths}
    known = str(folder.calibration)  # digests are unique wherever the calibrator wrote them
    for digest, path in file_digests(paths).items():
        if digest in known:
            raise ConfigError(f"{path} was used for calibration; give --data text that was held out")
    return texts


def load_model(model_dir: Path, device: str, dtype: torch.dtype):
    """The Hugging Face model (evaluation mode) and tokenizer of a folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    if not (model_dir / "config.json").is_file():
        raise ConfigError(f"{model_dir} has no config.json; give a Hugging Face model folder")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    if not tokenizer.is_fast:
        raise ConfigError(f"the tokenizer of {model_dir} is not a fast one; verify needs tokenizer.json")
    print(f"loading {model_dir} in {dtype} on {device}", file=sys.stderr)
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, **loading_options(model_dir))
    return model.to(device).eval(), tokenizer
