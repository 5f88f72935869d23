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
    "triton": ("vllm_kqsvd.ops.triton", "TritonOps", ("cuda",)),
    "cpu": ("vllm_kqsvd.ops.cpu", "CpuOps", ("cpu",)),
    "reference": ("vllm_kqsvd.ops.eager", "ReferenceOps", ("cpu", "cuda")),
}


def _load(name: str) -> tuple[type[LayerOps] | None, str]:
    """The class of an implementation, or None and why it cannot be used here."""
    module, cls, _ = IMPLEMENTATIONS[name]
    try:
        loaded = import_module(module)
    except ImportError as e:
        return None, str(e)
    available: Callable[[], tuple[bool, str]] | None = getattr(loaded, "available", None)
    if available is not None:
        usable, why = available()
        if not usable:
            return None, why
    return getattr(loaded, cls), ""


def choose(device: torch.device, implementation: str = "auto") -> tuple[type[LayerOps], list[str]]:
    """The implementation class for `device`, and one line for every faster one that was passed over.

    An explicitly named implementation that cannot run raises KernelError; "auto" never picks "reference"
    on a GPU, so that nobody serves at a thousandth of the speed without having asked for it.
    """
    if implementation != "auto":
        if implementation not in IMPLEMENTATIONS:
            raise ConfigError(f"implementation {implementation!r} asked for; there are {['auto', *IMPLEMENTATIONS]}")
        if device.type not in IMPLEMENTATIONS[implementation][2]:
            raise KernelError(f"implementation {implementation!r} asked for; it does not run on {device.type}")
        cls, why = _load(implementation)
        if cls is None:
            raise KernelError(f"implementation {implementation!r} asked for, but it is not available: {why}")
        return cls, []
    passed_over = []
    for name, (_, _, devices) in IMPLEMENTATIONS.items():
        if device.type not in devices or (name == "reference" and device.type != "cpu"):
            continue
        cls, why = _load(name)
        if cls is not None:
            return cls, passed_over
        passed_over.append(f"{name}: {why}")
    raise KernelError(f"no implementation runs on {device.type}: {'; '.join(passed_over)}")


def make_layer_ops(
    codec: LayerCodec, shape: LayerShape, device: torch.device, implementation: str = "auto"
) -> LayerOps:
    """LayerOps of one layer with its constants on `device`."""
    return choose(device, implementation)[0](codec.to(device), shape)
