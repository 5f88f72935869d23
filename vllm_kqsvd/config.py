# SPDX-License-Identifier: Apache-2.0
"""Serving options: `--additional-config '{"kqsvd": {...}}'`, and where the projection folder is found."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_kqsvd.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KEY = "kqsvd"  # in additional_config, and the folder looked for beside the model's config.json
IMPLEMENTATIONS = ("auto", "cuda", "triton", "cpu", "reference")
MIN_WINDOW = 32
TILE = 16


@dataclass(frozen=True)
class KQSVDConfig:
    """Options of the serving side.

    projection: folder written by `kqsvd calibrate`.
    window: positions kept exact (a multiple of 16, at least 32).
    implementation: "auto" | "cuda" | "triton" | "cpu" | "reference".
    digest: expected digest of the projection (or its beginning); "" accepts any.
    self_test: check every layer's kernels against the reference at start-up.
    check_nan: stop at the first layer that returns a value that is not finite (slow, no CUDA graphs).
    """

    projection: Path
    window: int = 64
    implementation: str = "auto"
    digest: str = ""
    self_test: bool = True
    check_nan: bool = False

    def __post_init__(self) -> None:
        if self.window < MIN_WINDOW or self.window % TILE:
            raise ConfigError(
                f"kqsvd.window is {self.window}; it must be a multiple of {TILE} and at least {MIN_WINDOW}: "
                "without exact recent tokens every codec loses several times in quality. The default is 64"
            )
        if self.implementation not in IMPLEMENTATIONS:
            raise ConfigError(
                f"kqsvd.implementation is {self.implementation!r}; use one of {', '.join(IMPLEMENTATIONS)}"
            )

    @classmethod
    def check_options(cls, options: Mapping[str, object]) -> None:
        """Raise ConfigError for unknown keys and values of the wrong type."""
        known = {f.name: f.type for f in fields(cls)}
        for key in options:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
                raise ConfigError(f"kqsvd.{key} is not an option; {hint}")
        types = {"Path": str, "int": int, "str": str, "bool": bool}
        for key, value in options.items():
            want = types[str(known[key])]
            if not isinstance(value, want) or (want is int and isinstance(value, bool)):
                raise ConfigError(f"kqsvd.{key} is {value!r}; it must be of type {want.__name__}")

    @classmethod
    def from_mapping(cls, options: Mapping[str, object]) -> KQSVDConfig:
        """Typed options from JSON. Raises ConfigError as `check_options` does, and without a projection."""
        cls.check_options(options)
        if "projection" not in options:
            raise ConfigError("kqsvd.projection is missing; give the folder written by `kqsvd calibrate`")
        return cls(**{**options, "projection": Path(str(options["projection"])).expanduser()})  # type: ignore[arg-type]

    @classmethod
    def from_vllm(cls, config: VllmConfig) -> KQSVDConfig:
        """Options of a vLLM run: `additional_config["kqsvd"]`, else a folder `kqsvd` beside the model's config.

        Raises ConfigError if CUSTOM was asked for and neither names a projection.
        """
        extra = config.additional_config
        options = extra.get(KEY, {}) if isinstance(extra, Mapping) else {}
        if not isinstance(options, Mapping):
            raise ConfigError(f"additional_config.{KEY} is {options!r}; it must be an object of options")
        cls.check_options(options)
        if "projection" not in options:
            beside = Path(config.model_config.model) / KEY
            if not (beside / "kqsvd_config.json").is_file():
                raise ConfigError(
                    f"--attention-backend CUSTOM needs a projection: none is named and {beside} is no projection "
                    'folder. Add --additional-config \'{"kqsvd": {"projection": "DIR"}}\' with the folder written by '
                    "`kqsvd calibrate`, or leave --attention-backend CUSTOM out"
                )
            options = {**options, "projection": str(beside)}
        return cls.from_mapping(options)
