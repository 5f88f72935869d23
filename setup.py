# SPDX-License-Identifier: Apache-2.0
"""The package's metadata and its optional CUDA extension; the only place for either.

KQSVD_BUILD_CUDA=0     pure Python wheel (Triton and PyTorch serve)
KQSVD_BUILD_CUDA=1     compile csrc/ into vllm_kqsvd/_C.abi3.so, or fail
KQSVD_BUILD_CUDA=auto  compile if nvcc and torch are there (default)
KQSVD_CUDA_ARCHS       default "90a"; a list such as "80;90a"
KQSVD_DECODE_KERNELS   substrings of the decode kernels to compile, such as "b82_c4;d64"; default all of them
MAX_JOBS               compilers at once, default the number of cores
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
TORCH_TARGET = "0x020a000000000000"  # stable ABI of PyTorch 2.10: one build serves every later version


def nvcc() -> str | None:
    """Path of the CUDA compiler: CUDA_HOME's, else the one on PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home, "bin")) if home else None)


def torch_folder() -> Path | None:
    """Folder of the installed torch, found without importing it."""
    spec = find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def cuda_sources() -> list[str]:
    """Every translation unit under csrc/, in path order; of the decode kernels those that are asked for."""
    names = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in {".cpp", ".cu"})
    wanted = [x for x in re.split("[,; ]+", os.environ.get("KQSVD_DECODE_KERNELS", "")) if x]
    if not wanted:
        return names
    return [n for n in names if "/decode_d" not in n or any(x in n for x in wanted)]


def wants_cuda() -> bool:
    """Whether this build compiles csrc/. Raises SystemExit with the reason if it must and cannot."""
    mode = os.environ.get("KQSVD_BUILD_CUDA", "auto")
    if mode not in {"0", "1", "auto"}:
        raise SystemExit(f"KQSVD_BUILD_CUDA={mode!r}: expected 0, 1 or auto")
    needs = {
        "nvcc (set CUDA_HOME or PATH)": nvcc(),
        "torch (install it first and pass --no-build-isolation)": torch_folder(),
        "sources under csrc/": cuda_sources(),
    }
    missing = [name for name, found in needs.items() if not found]
    if mode == "1" and missing:
        raise SystemExit("KQSVD_BUILD_CUDA=1 needs " + " and ".join(missing))
    return mode != "0" and not missing


class BuildCuda(build_ext):
    """Compile with nvcc alone against PyTorch's stable ABI headers.

    torch.utils.cpp_extension links torch's CUDA libraries and so cannot run beside a CPU build of torch; the
    stable ABI needs none of them, which lets a machine without a GPU make the same binary.
    """

    def build_extension(self, ext: Extension) -> None:
        torch, compiler = torch_folder(), nvcc()
        assert torch is not None and compiler is not None  # wants_cuda() has seen both
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        flags = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        flags += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-DUSE_CUDA", f"-I{ROOT / 'csrc'}"]
        flags += [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
        for arch in os.environ.get("KQSVD_CUDA_ARCHS", "90a").replace(",", ";").split(";"):
            flags.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
        with tempfile.TemporaryDirectory() as scratch:
            objects = [str(Path(scratch, f"{i}.o")) for i in range(len(ext.sources))]

            def compile_one(job: tuple[str, str]) -> None:
                if subprocess.run([compiler, *flags, "-c", job[0], "-o", job[1]]).returncode:
                    raise CompileError(f"nvcc refused {job[0]}; its messages stand above")

            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
                list(pool.map(compile_one, zip(ext.sources, objects, strict=True)))
            link = [f"-L{torch / 'lib'}", "-Xlinker=--no-as-needed", "-lc10", "-ltorch_cpu", "-ltorch"]
            # CUDA itself is linked statically; torch's libraries are already loaded when the extension is.
            subprocess.run([compiler, "-shared", *objects, *link, "-o", str(target)], check=True)


def version() -> str:
    source = (ROOT / "vllm_kqsvd" / "__init__.py").read_text()
    return re.search(r'^__version__ = "(.+)"$', source, re.M)[1]


with_cuda = wants_cuda()
EXTRAS = {
    "calibrate": ["transformers>=5", "tqdm", "matplotlib"],
    "ray": ["ray>=2.50"],
    "xformers": ["xformers>=0.0.35"],
    "bench": ["gguf>=0.19", "matplotlib", "openai>=2.25", "psutil", "scipy", "tokenizers"],
    "dev": ["pytest>=9", "hypothesis", "scipy", "ruff", "mypy", "import-linter", "pre-commit"],
}

setup(
    name="vllm-kqsvd",
    version=version(),
    description="Latent, mixed-bit KV cache for vLLM: KQ-SVD basis, SVDq bits, attention on the compressed pages",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    install_requires=["torch", "safetensors", "numpy"],
    extras_require=EXTRAS,
    packages=[
        *find_packages(include=["vllm_kqsvd", "vllm_kqsvd.*"]),
        "vllm_kqsvd.calibration",
        *(f"vllm_kqsvd.calibration.{name}" for name in find_packages("calibration")),
    ],
    package_dir={"vllm_kqsvd.calibration": "calibration"},
    package_data={"vllm_kqsvd": ["py.typed", "decode_speed.json"]},
    entry_points={
        "vllm.general_plugins": ["kqsvd = vllm_kqsvd.plugin:register"],
        "vllm.stat_logger_plugins": ["kqsvd = vllm_kqsvd.metrics:KQSVDStatLogger"],
        "console_scripts": ["kqsvd = vllm_kqsvd.cli:main"],
    },
    ext_modules=[Extension("vllm_kqsvd._C", cuda_sources(), py_limited_api=True)] if with_cuda else [],
    cmdclass={"build_ext": BuildCuda},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if with_cuda else {},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
