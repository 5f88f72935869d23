# SPDX-License-Identifier: Apache-2.0
"""The whole calibration of one model: probe, collect, solve, and a Projection ready to be saved."""

from __future__ import annotations

import dataclasses
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from transformers import AutoTokenizer, PreTrainedModel

from vllm_kqsvd.calibration.allocate import plane_bytes
from vllm_kqsvd.calibration.basis import BASES, NESTED
from vllm_kqsvd.calibration.capture import load_model
from vllm_kqsvd.calibration.collect import CollectOptions, Collector
from vllm_kqsvd.calibration.corpus import Corpus
from vllm_kqsvd.calibration.distributed import collect_with_ray
from vllm_kqsvd.calibration.frames import ROPE_MODES, Frame
from vllm_kqsvd.calibration.layer_budgets import LAYER_BUDGETS
from vllm_kqsvd.calibration.layer_choice import choose_layers
from vllm_kqsvd.calibration.layer_costs import budget_texts
from vllm_kqsvd.calibration.model_probe import NO_ROPE, LayerInfo, probe
from vllm_kqsvd.calibration.solve import ROTATED, SHAPED, SolvedLayer, SolveOptions, make_solvers, solve
from vllm_kqsvd.calibration.statistics import Statistics
from vllm_kqsvd.errors import CalibrationError
from vllm_kqsvd.plan import LayerPlan
from vllm_kqsvd.projection import LayerEntry, ModelFingerprint, Projection

logger = logging.getLogger(__name__)
PRESETS = {"balanced": 4.0, "compact": 3.0, "capacity": 2.5, "extreme": 2.0}
STATISTICS_FILE = "statistics.safetensors"


@dataclass(frozen=True)
class CalibrateOptions:
    """Everything a calibration depends on besides model and data; equal options and inputs give equal bytes.

    nested: see solve.SolveOptions. rope_block 0: 32, or 64 where more than 4 query heads of more than 64 channels share
    a KV head. max_position: positions a `post` basis must serve, 0 for the model's own maximum. layer_budgets: "equal"
    bytes for every layer; "measured": as layers need them, at the same total; "auto": measured if that is a clear gain.
    """

    bits: float = 4.0
    basis: str = "mix"
    center: bool = True
    nested: bool = False
    rope_mode: str = "page"
    rope_block: int = 0
    max_position: int = 0
    max_plans: int = 4
    plans: str = "auto"  # solve.PLAN_CHOICES
    layer_budgets: str = "auto"
    collect: CollectOptions = field(default_factory=CollectOptions)

    def __post_init__(self) -> None:
        if self.basis not in BASES:
            raise CalibrationError(f"basis {self.basis!r} asked for; choose one of {', '.join(BASES)}")
        if self.rope_mode not in ROPE_MODES:
            raise CalibrationError(f"rope mode {self.rope_mode!r} asked for; choose one of {', '.join(ROPE_MODES)}")
        if self.layer_budgets not in LAYER_BUDGETS:
            raise CalibrationError(
                f"layer budgets {self.layer_budgets!r} asked for; choose one of {', '.join(LAYER_BUDGETS)}"
            )


class Described(Protocol):
    """Text that can say which files it is."""

    def describe(self) -> list[dict[str, object]]:
        """Name, size and digest of every file."""


def bits_of_ratio(ratio: float, head_dim: int) -> float:
    """Largest bit budget at which a bf16 cache shrinks at least `ratio` times, scale bytes counted."""
    planes = int((4 * head_dim / ratio - 2) // 8) * 8
    return 8 * planes / (2 * head_dim)


def partial_folder(output: Path) -> Path:
    """Where an unfinished calibration keeps its statistics."""
    return output.with_name(f".{output.name}.partial")


@contextmanager
def only_user(folder: Path) -> Iterator[None]:
    """Keep other calibrations out of a partial folder, until this block or this process ends.

    Raises CalibrationError if one is there, or if the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder, os.O_RDONLY)
    except OSError as e:
        raise CalibrationError(
            f"cannot save the growing statistics in {folder}: {e}; free some space or choose another --output"
        ) from e
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise CalibrationError(
                f"another calibration is writing to {folder}; wait for its end or choose another --output"
            ) from e
        yield
    finally:
        os.close(fd)


def calibrate(
    model_dir: str | Path,
    data: Sequence[str | Path],
    options: CalibrateOptions | None = None,
    *,
    output: str | Path | None = None,
    resume: bool = False,
    device: str | None = None,
    workers: int = 1,
) -> Projection:
    """Calibrate the model of a Hugging Face folder on local text files.

    With `output` the statistics are saved beside that folder while they grow, and `resume` goes on from them; `workers`
    above 1 spreads the windows over so many ray tasks instead. Nothing else is written; save the result with
    vllm_kqsvd.projection.save_projection. Raises CalibrationError or UnsupportedError, each in one sentence.
    """
    options = options or CalibrateOptions()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    statistics, layers, corpus, model = _collect(model_dir, data, options, output, resume, device, workers)
    return project(model_dir, layers, statistics, corpus, options, device, model)


def collect_statistics(
    model_dir: str | Path,
    data: Sequence[str | Path],
    options: CalibrateOptions,
    *,
    output: str | Path | None = None,
    resume: bool = False,
    device: str = "cpu",
    workers: int = 1,
) -> tuple[Statistics, list[LayerInfo], Corpus]:
    """The part that runs the model: (statistics of all windows, layers, text)."""
    return _collect(model_dir, data, options, output, resume, device, workers)[:3]


def _collect(
    model_dir: str | Path,
    data: Sequence[str | Path],
    options: CalibrateOptions,
    output: str | Path | None,
    resume: bool,
    device: str,
    workers: int,
) -> tuple[Statistics, list[LayerInfo], Corpus, PreTrainedModel]:
    collect = options.collect
    tokenizer = AutoTokenizer.from_pretrained(str(model_dir))
    corpus = Corpus(data, tokenizer, collect.window_length, collect.seed, collect.chat)
    model = load_model(str(model_dir), device, torch.bfloat16 if device.startswith("cuda") else torch.float32)
    layers = probe(model)
    collector = Collector(model, layers, corpus, collect)
    identity: dict[str, object] = {
        "model": ModelFingerprint.from_hf(model_dir).weights_sha256,
        "data": corpus.describe(),
        "collect": dataclasses.asdict(collect),
    }
    path = partial_folder(Path(output)) / STATISTICS_FILE if output is not None else None
    with only_user(path.parent) if path else nullcontext():
        if path and resume and path.exists():
            statistics = Statistics.load(path, identity, device)
            logger.info("going on after window %d of %d", statistics.steps_done, collector.num_steps)
        else:
            statistics = collector.start(identity)
            if path:
                statistics.save(path)  # an output that cannot be written shows now, not after the last window
        if workers > 1 and statistics.steps_done == 0:
            gpus = {"num_gpus": 1} if device.startswith("cuda") else {}
            statistics = collect_with_ray(model_dir, data, collect, statistics, workers, device, **gpus)
        else:
            collector.run(statistics, range(statistics.steps_done, collector.num_steps), path)
        statistics.texts = budget_texts(corpus, collector.num_steps)
        if path:
            statistics.save(path)
    return statistics, layers, corpus, model


def frame_of(layer: LayerInfo, options: CalibrateOptions, longest: int) -> Frame:
    """The frame in which a layer's keys are coded under these options."""
    mode = options.rope_mode if layer.rope.rotary_dim else "none"
    if mode == "none" and layer.rope.rotary_dim:
        raise CalibrationError(f"rope mode 'none' asked for, but {layer.name} has RoPE; use page or post")
    block = {"pre": 1, "post": 0, "none": 0}.get(mode, options.rope_block or _default_block(layer))
    rope = layer.rope if mode != "none" else NO_ROPE
    return Frame(mode, block, rope, longest if mode == "post" else None)


def _default_block(layer: LayerInfo) -> int:
    """Absorbing the query costs a matrix product per block and query head; longer blocks or shorter heads halve it."""
    return 64 if layer.group > 4 and layer.head_dim > 64 else 32


def project(
    model_dir: str | Path,
    layers: list[LayerInfo],
    statistics: Statistics,
    corpus: Described,
    options: CalibrateOptions,
    device: str = "cpu",
    model: PreTrainedModel | None = None,
) -> Projection:
    """The part that solves: any number of budgets, bases and rope modes from the same statistics.

    model: what unequal layers are measured with; without it `layer_budgets="auto"` makes them equal.
    """
    fingerprint = ModelFingerprint.from_hf(model_dir)
    dims = {(layer.head_dim, layer.num_kv_heads) for layer in layers}
    if len(dims) > 1:
        raise CalibrationError(f"layers of different shapes (head_dim, KV heads) {sorted(dims)} are not supported")
    longest = options.max_position or _longest_position(model_dir)
    layers, rope_index = _with_settings(layers, fingerprint, options)
    frames = [frame_of(layer, options, longest) for layer in layers]
    total = plane_bytes(options.bits, fingerprint.head_dim)
    solvers = make_solvers(
        layers,
        statistics.layers,
        frames,
        SolveOptions(
            basis=options.basis,
            center=options.center,
            nested=options.nested,
            max_plans=options.max_plans,
            plans=options.plans,
            window=options.collect.window,
            context=options.collect.window_length,
            seed=options.collect.seed,
            device=device,
        ),
    )
    outcome = choose_layers(
        options.layer_budgets, solvers, solve(solvers, total), statistics.texts, model, options.bits
    )
    solved = outcome.solved
    entries = {
        layer.index: _entry(layer, frame, index, result, options.basis)
        for layer, frame, index, result in zip(layers, frames, rope_index, solved, strict=True)
    }
    return Projection(
        fingerprint,
        entries,
        describe(corpus, statistics, options, [s.codec.plan for s in solved], fingerprint.head_dim) | outcome.about,
        [s.logit_error for s in solved],
    )


def describe(
    corpus: Described, statistics: Statistics, options: CalibrateOptions, plans: Sequence[LayerPlan], head_dim: int
) -> dict[str, object]:
    """The `calibration` entry of the file: what it was made from and with."""
    collect = options.collect
    return {
        "data": corpus.describe(),
        "num_windows": collect.num_windows,
        "window_length": collect.window_length,
        "tokens": collect.num_windows * collect.window_length,
        "gradient_tokens": collect.gradient_windows * collect.gradient_length,
        "gradients": "backward" if collect.backward else "local",
        "seed": collect.seed,
        "bits": options.bits,
        "bits_per_element": sum(p.bits_per_element(head_dim) for p in plans) / len(plans),
        "basis": options.basis,
        "center": options.center,
        "nested": options.nested or options.basis in NESTED,
        "exact_window": collect.window,
        "max_plans": options.max_plans,
        "plans": options.plans,
        "tiers": "shaped" if options.basis in SHAPED else "random" if options.basis in ROTATED else "none",
    }


def _entry(layer: LayerInfo, frame: Frame, rope: int, result: SolvedLayer, basis: str) -> LayerEntry:
    return LayerEntry(
        index=layer.index,
        name=layer.name,
        rope_mode=frame.mode,
        rope_block=frame.rope_block,
        rope=rope,
        max_position=frame.max_position,
        k_basis=basis,
        v_basis=basis,
        codec=result.codec,
        spectrum=result.spectrum,
    )


def _with_settings(
    layers: list[LayerInfo], fingerprint: ModelFingerprint, options: CalibrateOptions
) -> tuple[list[LayerInfo], list[int]]:
    """Layers with the frequencies of the RoPE setting the probe found them to use, and that setting's index."""
    out, index = [], []
    for layer in layers:
        if layer.rope.rotary_dim == 0:
            out.append(layer)
            index.append(0)
            continue
        n = _setting_of(layer, fingerprint)
        if fingerprint.rope[n].has_sections and options.rope_mode != "post":
            raise CalibrationError(
                "the model has three-dimensional positions (mRoPE), which no rope block fits; use --rope-mode post"
            )
        out.append(dataclasses.replace(layer, rope=fingerprint.rope[n].spec()))
        index.append(n)
    return out, index


def _setting_of(layer: LayerInfo, fingerprint: ModelFingerprint) -> int:
    found = layer.rope
    for n, setting in enumerate(fingerprint.rope):
        if (setting.rotary_dim, setting.interleaved) == (found.rotary_dim, found.interleaved) and torch.allclose(
            setting.inv_freq, found.inv_freq, rtol=1e-4, atol=0
        ):
            return n
    raise CalibrationError(
        f"{layer.name} rotates its keys otherwise than the model's config says ({found.rotary_dim} dims, "
        f"{'interleaved' if found.interleaved else 'neox'}); this architecture is not supported"
    )


def _longest_position(model_dir: str | Path) -> int:
    from transformers import AutoConfig

    return int(getattr(AutoConfig.from_pretrained(str(model_dir)).get_text_config(), "max_position_embeddings", 8192))


def keep_statistics(output: str | Path, path: Path) -> None:
    """Move the statistics of a finished calibration to `path`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(partial_folder(Path(output)) / STATISTICS_FILE, path)
    except OSError as e:
        raise CalibrationError(f"cannot write the statistics to {path}: {e}; the projection itself is complete") from e


def remove_partial(output: str | Path) -> None:
    """Delete the statistics of a finished calibration."""
    shutil.rmtree(partial_folder(Path(output)), ignore_errors=True)
