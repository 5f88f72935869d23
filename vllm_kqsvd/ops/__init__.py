# SPDX-License-Identifier: Apache-2.0
"""The operations: what they mean (reference), what serves them (cuda, triton, cpu) and who chooses (dispatch).

Names are resolved lazily because `codec` needs `ops.rope_block` and the implementations need `codec`.
"""

from __future__ import annotations

from importlib import import_module

_HOME = {
    "IMPLEMENTATIONS": "dispatch",
    "choose": "dispatch",
    "make_layer_ops": "dispatch",
    "LayerOps": "interface",
    "LayerShape": "interface",
    "Step": "interface",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
