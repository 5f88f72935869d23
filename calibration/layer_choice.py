# SPDX-License-Identifier: Apache-2.0
"""Equal or unequal layers: measures, chooses, solves and checks; says in one sentence what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from vllm_kqsvd.calibration.layer_budgets import (
    PROMISE,
    SCALE_BYTES,
    Verdict,
    bytes_of_layers,
    choose_plans,
    sizes_around,
)
from vllm_kqsvd.calibration.layer_costs import judge, sensitivities
from vllm_kqsvd.calibration.model_probe import LayerInfo
from vllm_kqsvd.calibration.solve import LayerSolver, SolvedLayer, finish, plans_to_choose_from
from vllm_kqsvd.codec import LayerCodec
from vllm_kqsvd.errors import CalibrationError, UnsupportedError


@dataclass(frozen=True)
class Outcome:
    """Coders of all layers, and what is recorded about their budgets."""

    solved: list[SolvedLayer]
    about: dict[str, object]


def whole_context_only(model: PreTrainedModel, layers: Sequence[LayerInfo]) -> bool:
    """Whether every layer of the model is attention over the whole context: beside others vLLM pads unequal pages."""
    windows = any(getattr(layer.module, "sliding_window", None) for layer in layers)
    return not windows and len(layers) == model.config.get_text_config().num_hidden_layers


def choose_layers(
    asked: str,
    solvers: Sequence[LayerSolver],
    equal: list[SolvedLayer],
    texts: Mapping[str, torch.Tensor],
    model: PreTrainedModel | None,
    bits: float = 0.0,
) -> Outcome:
    """Unequal layers of as many bytes (of `bits` per element if that is more) if `asked` ("auto", "measured") and the
    measurements say so, else `equal`.

    texts: of layer_costs.budget_texts. Raises CalibrationError if "measured" is asked for and cannot be.
    """
    layers, options = [s.layer for s in solvers], solvers[0].options
    total = equal[0].codec.plan.bytes_per_token - SCALE_BYTES
    sizes = sizes_around(options.plans, layers[0].head_dim, {s.frame.rope_block for s in solvers}, total)
    why = None
    if asked == "equal" or len(layers) < 3:
        why = "asked for" if asked == "equal" else "too few layers to move bytes between"
    elif total in (sizes[0], sizes[-1]):
        why = f"no plans of {'more' if total == sizes[-1] else 'fewer'} bytes with a CUDA decode kernel"
    elif model is None or not len(texts.get("choose", ())):
        why = "no calibration text to measure layers on"
    elif not whole_context_only(model, layers):
        why = "the model has layers of other kinds, beside which vLLM pads unequal pages"
    if why is not None:
        if asked == "measured":
            raise CalibrationError(f"--layer-budgets measured asked for; not possible: {why}; use equal or auto")
        return Outcome(equal, _about("equal", f"equal: {why}"))
    assert model is not None
    try:
        room = bytes_of_layers(bits, layers[0].head_dim, len(layers))
        return _measured(asked, solvers, equal, texts, _precise(model), sizes, room)
    except UnsupportedError as e:  # attention that calibration can observe and the harness cannot repeat
        if asked == "measured":
            raise
        return Outcome(equal, _about("equal", f"equal: layers cannot be measured alone: {e}"))


def _measured(
    asked: str,
    solvers: Sequence[LayerSolver],
    equal: list[SolvedLayer],
    texts: Mapping[str, torch.Tensor],
    model: PreTrainedModel,
    sizes: Sequence[int],
    room: int,
) -> Outcome:
    """`choose_layers` where nothing stands against measuring. sizes: bytes of planes that a layer may have; room: of
    all layers together, if that is more than those of `equal`."""
    layers, options = [s.layer for s in solvers], solvers[0].options
    blocks, plans = {s.frame.rope_block for s in solvers}, [x.codec.plan for x in equal]
    sensitivity = sensitivities(model, texts, _codecs(layers, equal), options.window)
    assert sensitivity is not None
    known = {s: plans_to_choose_from(options.plans, layers[0].head_dim, blocks, s, quiet=True) for s in sizes}
    tables = [(s.sides["k"].table, s.sides["v"].table) for s in solvers]
    choice = choose_plans(sensitivity, tables, plans, known, options.max_plans, room)
    if choice.plans == plans or (asked == "auto" and choice.predicted > 1 - PROMISE):
        return Outcome(equal, _about("equal", "equal: the best unequal ones promise less than 5 % lower KL"))
    moved = [n for n, (new, old) in enumerate(zip(choice.plans, plans, strict=True)) if new != old]
    redone = finish([solvers[n] for n in moved], [choice.plans[n] for n in moved], options.device)
    unequal = list(equal)
    for n, one in zip(moved, redone, strict=True):
        unequal[n] = one
    found = sorted(p.bytes_per_token for p in choice.plans)
    named = f"{found[0]} to {found[-1]} bytes a token and head"
    verdict = judge(model, texts, _codecs(layers, equal), _codecs(layers, unequal), options.window)
    if asked == "measured" or (verdict is not None and verdict.convinces):
        return Outcome(unequal, _about("unequal", f"{named}: {_words(verdict, choice.predicted)}", verdict))
    reason = f"equal: {named} are no sure gain ({_words(verdict, choice.predicted)})"
    return Outcome(equal, _about("equal", reason, verdict))


def _codecs(layers: Sequence[LayerInfo], solved: Sequence[SolvedLayer]) -> dict[int, LayerCodec]:
    """Coders on the model's device by the number that the attention modules know themselves by."""
    out = {}
    for layer, one in zip(layers, solved, strict=True):
        device = next(layer.module.parameters()).device
        out[int(getattr(layer.module, "layer_idx", layer.index))] = one.codec.to(device)
    return out


def _precise(model: PreTrainedModel) -> PreTrainedModel:
    """The model in float32 where a GPU's memory allows: rounding to bfloat16 hides what a layer alone costs."""
    if model.device.type != "cuda" or model.dtype == torch.float32:
        return model
    free, _ = torch.cuda.mem_get_info(model.device)
    needed = 4 * sum(p.numel() for p in model.parameters())
    return model.float() if free > 1.1 * needed else model


def _words(verdict: Verdict | None, predicted: float) -> str:
    if verdict is None:
        return f"predicted {100 * (1 - predicted):.0f} % less KL; too little text to check it"
    change = f"{100 * abs(verdict.gain):.0f} % {'less' if verdict.gain >= 0 else 'more'}"
    error = 100 * verdict.error / max(verdict.equal, 1e-30)
    return f"KL {verdict.unequal:.2g} instead of {verdict.equal:.2g}, {change}, standard error {error:.0f} %"


def _about(used: str, sentence: str, verdict: Verdict | None = None) -> dict[str, object]:
    about: dict[str, object] = {"layer_budgets": used, "layer_budgets_reason": sentence}
    if verdict is not None:
        values = {"equal": verdict.equal, "unequal": verdict.unequal, "standard_error": verdict.error}
        about["layer_budgets_kl"] = {name: float(f"{x:.4g}") for name, x in values.items()}
    return about
