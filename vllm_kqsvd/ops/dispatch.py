# SPDX-License-Identifier: Apache-2.0
"""Choice of the implementation that stores and attends: cuda, triton, cpu or reference."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch

from vllm_kqsvd.codec import LayerCodec
from vllm_kqsvd.errors import ConfigError, KernelError
from vllm_kqsvd.ops.interface import LayerOps, LayerShape

# name -> (module, class, device types); order = preference of "auto"
IMPLEMENTATIONS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "cuda": ("vllm_kqsvd.ops.cuda", "CudaOps", ("cuda",)),
    "cuda+triton": ("vllm_kqsvd.ops.cuda_mixed", "MixedOps", ("cuda",)),
    "triton": ("vllm_kqsvd.ops.triton", "TritonOps", ("cuda",)),
    "cpu": ("vllm_kqsvd.ops.cpu", "CpuOps", ("cpu",)),
    "reference": ("vllm_kqsvd.ops.eager", "ReferenceOps", ("cpu", "cuda")),
}


def _load(
    name: str, codec: LayerCodec | None = None, shape: LayerShape | None = None
) -> tuple[type[LayerOps] | None, str]:
    """The class of an implementation, or None and why it cannot serve (this layer, if one is given) here."""
    module, cls, _ = IMPLEMENTATIONS[name]
    try:
        loaded = import_module(module)
    except ImportError as e:
        return None, str(e)
    checks: list[tuple[str, tuple[object, ...]]] = [("available", ())]
    if codec is not None and shape is not None:
        checks.append(("supports", (codec, shape)))
    for check, arguments in checks:
        function: Callable[..., tuple[bool, str]] | None = getattr(loaded, check, None)
        if function is not None:
            usable, why = function(*arguments)
            if not usable:
                return None, why
    return getattr(loaded, cls), ""


def choose(
    device: torch.device,
    implementation: str = "auto",
    codec: LayerCodec | None = None,
    shape: LayerShape | None = None,
) -> tuple[type[LayerOps], list[str]]:
    """The implementation class for `device` (and a layer), and one line for every faster one passed over.

    An explicitly named implementation that cannot run raises KernelError; "auto" never picks "reference"
    on a GPU, so that nobody serves at a thousandth of the speed without having asked for it.
    """
    if implementation != "auto":
        if implementation not in IMPLEMENTATIONS:
            raise ConfigError(f"implementation {implementation!r} asked for; there are {['auto', *IMPLEMENTATIONS]}")
        if device.type not in IMPLEMENTATIONS[implementation][2]:
            raise KernelError(f"implementation {implementation!r} asked for; it does not run on {device.type}")
        cls, why = _load(implementation, codec, shape)
        if cls is None:
            raise KernelError(f"implementation {implementation!r} asked for, but it is not available: {why}")
        return cls, []
    passed_over: list[str] = []
    for name, (_, _, devices) in IMPLEMENTATIONS.items():
        if device.type not in devices or (name == "reference" and device.type != "cpu"):
            continue
        cls, why = _load(name, codec, shape)
        if cls is not None:
            return cls, passed_over
        passed_over.append(f"{name}: {why}")
    raise KernelError(f"no implementation runs on {device.type}: {'; '.join(passed_over)}")


def make_layer_ops(
    codec: LayerCodec, shape: LayerShape, device: torch.device, implementation: str = "auto"
) -> LayerOps:
    """LayerOps of one layer with its constants on `device`; `passed_over` names faster ones and why not."""
    cls, passed_over = choose(device, implementation, codec, shape)
    ops = cls(codec.to(device), shape)
    ops.passed_over = passed_over
    return ops
