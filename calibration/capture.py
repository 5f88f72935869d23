# SPDX-License-Identifier: Apache-2.0
"""Sees queries, keys and values of every attention layer of any Hugging Face decoder, through one registered
attention function; no model code is forked or patched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vllm_kqsvd.calibration.gradients import FarAttention
from vllm_kqsvd.checkpoint import loading_options
from vllm_kqsvd.errors import CalibrationError, UnsupportedError

ATTENTION = "kqsvd_capture"


@dataclass(frozen=True)
class AttentionCall:
    """One attention call of one sequence: q [Hq, T, d]; k, v [H, T, d] after RoPE; mask [T, T] or None (causal)."""

    module: nn.Module
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    scale: float
    soft_cap: float


Observer = Callable[[AttentionCall], None]
GradientObserver = Callable[[nn.Module, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class _Session:
    observer: Observer | None = None
    gradient_observer: GradientObserver | None = None
    window: int = 0


# The attention interface passes no context of its own; a context variable lets threads share one model.
_session: ContextVar[_Session | None] = ContextVar("kqsvd_capture_session", default=None)


class PassDone(Exception):
    """Raised by an observer that has seen all it wants; ends the forward pass it stands in (see `until_done`)."""


@contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Every attention call inside the block is shown to `observer`."""
    with _use(_Session(observer)):
        yield


@contextmanager
def observe_gradients(forward: Observer, backward: GradientObserver, window: int) -> Iterator[None]:
    """As `observe(forward)`; and in backward passes through calls made inside the block `backward` gets
    (module, dL/dk, dL/dv), both [H, T, d] float32, after RoPE, through queries at least `window` positions later."""
    with _use(_Session(forward, backward, window)):
        yield


@contextmanager
def _use(session: _Session) -> Iterator[None]:
    token = _session.set(session)
    try:
        yield
    finally:
        _session.reset(token)


def _capture(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function transformers calls: [B, heads, T, d] -> ([B, T, Hq, d], None)."""
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    soft_cap = float(kwargs.get("softcap") or 0.0)
    if kwargs.get("s_aux") is not None:
        raise UnsupportedError(
            f"{type(module).__name__} adds learned sinks to its softmax; such models are not supported"
        )
    if query.shape[0] != 1 or key.shape[-1] != value.shape[-1]:
        raise UnsupportedError(
            f"{type(module).__name__} has keys {tuple(key.shape)} and values {tuple(value.shape)}; one sequence with "
            "keys and values of one width is needed (multi-head latent attention is not supported)"
        )
    mask = None if attention_mask is None else attention_mask[0, 0]
    call = AttentionCall(module, query[0], key[0], value[0], mask, scale, soft_cap)
    session = _session.get() or _Session()
    if session.observer:
        session.observer(call)
    if session.gradient_observer or soft_cap:
        return _differentiable(call), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _differentiable(call: AttentionCall) -> torch.Tensor:
    session, module = _session.get() or _Session(), call.module
    observer = session.gradient_observer

    def report(dk: torch.Tensor, dv: torch.Tensor) -> None:
        if observer:
            observer(module, dk, dv)

    q, k, v = (x.float() for x in (call.q, call.k, call.v))
    out = FarAttention.apply(q, k, v, call.mask, call.scale, call.soft_cap, session.window, report)
    return out.to(call.q.dtype).transpose(0, 1)[None]


def load_model(folder: str, device: torch.device | str, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a Hugging Face folder with the capturing attention, frozen, in eval mode."""
    AttentionInterface.register(ATTENTION, _capture)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    try:
        options = loading_options(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=ATTENTION, **options)
    except (OSError, ValueError, KeyError, ImportError) as e:
        raise CalibrationError(f"cannot load a causal language model from {folder}: {e}") from e
    model = nn.Module.to(model, device)
    return model.eval().requires_grad_(False)
