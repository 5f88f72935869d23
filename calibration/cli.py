# SPDX-License-Identifier: Apache-2.0
"""`kqsvd calibrate`: from a model folder and text files to a projection folder."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from vllm_kqsvd.calibration.basis import BASES
from vllm_kqsvd.calibration.budget import add_budget, bits_asked
from vllm_kqsvd.calibration.calibrate import CalibrateOptions, calibrate, keep_statistics, remove_partial
from vllm_kqsvd.calibration.collect import CollectOptions
from vllm_kqsvd.calibration.frames import ROPE_MODES
from vllm_kqsvd.calibration.layer_budgets import LAYER_BUDGETS
from vllm_kqsvd.calibration.reuse import solve_again
from vllm_kqsvd.calibration.solve import PLAN_CHOICES
from vllm_kqsvd.errors import CalibrationError
from vllm_kqsvd.plan import layer_range
from vllm_kqsvd.plan_catalog import compiled_plans
from vllm_kqsvd.projection import ModelFingerprint, Projection, save_projection


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `kqsvd calibrate`."""
    defaults, collect = CalibrateOptions(), CollectOptions()
    parser.add_argument("model", type=Path, help="Hugging Face model folder")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="projection folder to write")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--data", type=Path, nargs="+", metavar="FILE", help="text: .txt, .md or .jsonl")
    text.add_argument(
        "--statistics",
        type=Path,
        metavar="FILE",
        help="instead of text: what another run wrote with --keep-statistics, for other bits, basis or rope mode",
    )
    parser.add_argument("--keep-statistics", type=Path, metavar="FILE", help="write the moments for later runs")
    add_budget(parser)
    parser.add_argument("--basis", choices=BASES, default=defaults.basis, help="latent basis (default %(default)s)")
    parser.add_argument(
        "--nested", action="store_true", help="mix channels only within groups of 16, for the best `kqsvd cut` later"
    )
    parser.add_argument("--no-center", action="store_true", help="do not remove the mean")
    parser.add_argument(
        "--rope-mode", choices=ROPE_MODES, default=defaults.rope_mode, help="frame of the keys (default %(default)s)"
    )
    parser.add_argument(
        "--rope-block",
        type=int,
        default=0,
        metavar="T",
        help="positions per rope block (default 32; 64 if GQA > 4, head_dim > 64)",
    )
    parser.add_argument(
        "--max-model-len",
        type=int,
        default=0,
        metavar="N",
        help="positions --rope-mode post must serve (default: model's)",
    )
    parser.add_argument(
        "--max-plans", type=int, default=defaults.max_plans, help="distinct bit plans of a size (default %(default)s)"
    )
    parser.add_argument(
        "--plans",
        choices=PLAN_CHOICES,
        default=defaults.plans,
        help="catalogue: only bit plans with a compiled CUDA decode kernel; free: any, which GPUs decode with slower "
        "Triton kernels; auto: catalogue where it has the asked width, else free (default %(default)s)",
    )
    parser.add_argument(
        "--layer-budgets",
        choices=LAYER_BUDGETS,
        default=defaults.layer_budgets,
        help="bytes of a layer: equal; measured: more for layers that need it, at the same total; auto: measured if "
        "held-out windows of the text confirm at least 25 %% less KL (default %(default)s)",
    )
    parser.add_argument(
        "--num-windows", type=int, default=collect.num_windows, help="text windows (default %(default)s)"
    )
    parser.add_argument(
        "--window-length", type=int, default=collect.window_length, help="tokens each (default %(default)s)"
    )
    parser.add_argument(
        "--gradient-windows",
        type=int,
        default=collect.gradient_windows,
        help="windows with gradients (default %(default)s)",
    )
    parser.add_argument(
        "--gradient-length", type=int, default=collect.gradient_length, help="tokens each (default %(default)s)"
    )
    parser.add_argument("--samples", type=int, default=collect.samples, help="tokens kept for the quantizer's tables")
    parser.add_argument(
        "--exact-window",
        type=int,
        default=collect.window,
        help="recent tokens that will be served exactly (default %(default)s)",
    )
    parser.add_argument(
        "--no-backward", action="store_true", help="gradients of each layer's own output only: no backward pass"
    )
    parser.add_argument("--no-chat", action="store_true", help="no windows in the tokenizer's chat template")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from an interrupted run of the same options")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="spread the windows over N ray tasks")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")


def options_from(args: argparse.Namespace) -> CalibrateOptions:
    """The calibration's options from parsed arguments."""
    collect = CollectOptions(
        num_windows=args.num_windows,
        window_length=args.window_length,
        gradient_windows=args.gradient_windows,
        gradient_length=min(args.gradient_length, args.window_length),
        samples=args.samples,
        window=args.exact_window,
        backward=not args.no_backward,
        chat=not args.no_chat,
        seed=args.seed,
    )
    return CalibrateOptions(
        bits=bits_asked(args, _head_dim(args.model) if args.ratio else 0),
        basis=args.basis,
        center=not args.no_center,
        nested=args.nested,
        rope_mode=args.rope_mode,
        rope_block=args.rope_block,
        max_position=args.max_model_len,
        max_plans=args.max_plans,
        plans=args.plans,
        layer_budgets=args.layer_budgets,
        collect=collect,
    )


def _head_dim(model: Path) -> int:
    return ModelFingerprint.from_hf(model).head_dim


def run(args: argparse.Namespace) -> int:
    """Entry point of the command."""
    if not (args.model / "config.json").is_file():
        raise CalibrationError(f"{args.model} is not a Hugging Face model folder (no config.json)")
    check_output(args.output)
    began = time.monotonic()
    if args.statistics:
        projection = solve_again(args.model, args.statistics, options_from(args), args.device)
    else:
        projection = calibrate(
            args.model,
            args.data,
            options_from(args),
            output=args.output,
            resume=args.resume,
            device=args.device,
            workers=args.workers,
        )
    digest = save_projection(projection, args.output)
    if args.keep_statistics and not args.statistics:
        keep_statistics(args.output, args.keep_statistics)
    remove_partial(args.output)
    print(summary(projection, args.output, digest, time.monotonic() - began))
    return 0


def check_output(output: Path) -> None:
    """Refuse an output that save_projection would refuse, before the work instead of after it."""
    if output.exists() and not output.is_dir():
        raise CalibrationError(f"--output {output} exists and is not a folder; choose another")
    if output.is_dir() and any(output.iterdir()) and not (output / "kqsvd.safetensors").is_file():
        raise CalibrationError(f"--output {output} exists and holds other files; choose another")


def summary(projection: Projection, output: Path, digest: str, seconds: float | None = None) -> str:
    """What was written, in a few lines."""
    plans = {e.codec.plan for e in projection.layers.values()}
    head_dim = projection.model.head_dim
    compiled = all(e.codec.plan in compiled_plans(head_dim, e.rope_block) for e in projection.layers.values())
    error = projection.predicted
    return "\n".join(
        (
            f"wrote {output} (digest {digest[:12]})" + (f" in {seconds:.0f} s" if seconds is not None else ""),
            f"  {len(projection.layers)} layers, {len(plans)} bit plans "
            f"({'with CUDA decode kernels' if compiled else 'without a CUDA decode kernel: Triton decodes'}), "
            f"{projection.calibration['bits_per_element']:.3f} bits per element with scales"
            f"{layer_range(*projection.layer_bits)}, "
            f"{projection.compression_ratio():.2f}x smaller than 16 bits (exact window not counted)",
            f"  predicted relative logit error: mean {sum(error) / max(1, len(error)):.4f}, "
            f"worst {max(error, default=0.0):.4f}",
            *(f"  layers {reason}" for reason in [projection.calibration.get("layer_budgets_reason")] if reason),
        )
    )
