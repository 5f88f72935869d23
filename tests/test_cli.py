# SPDX-License-Identifier: Apache-2.0
"""The kqsvd command: verbs, exit codes, JSON on stdout and nothing else there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import pytest

from tests.projections import tiny_projection, write_model
from vllm_kqsvd import __version__, cli, doctor_checks
from vllm_kqsvd.errors import CalibrationError
from vllm_kqsvd.projection import ModelFingerprint, save_projection

GOLDEN = str(Path(__file__).parent / "data" / "projection_v1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its projection in the folder `kqsvd` beside its config."""
    folder = write_model(tmp_path_factory.mktemp("model"))
    save_projection(tiny_projection(ModelFingerprint.from_hf(folder)), folder / "kqsvd")
    return folder


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in ("calibrate", "inspect", "verify", "plan", "doctor"))
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"vllm_kqsvd {__version__}"


@pytest.mark.parametrize("argv", [[], ["frobnicate"], ["inspect"], ["inspect", GOLDEN, "--nonsense"]])
def test_wrong_arguments_exit_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    assert "usage: kqsvd" in capsys.readouterr().err


def test_refusals_exit_with_1_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["inspect", str(tmp_path)], ["inspect", "/nowhere", "--json"], ["inspect", GOLDEN, "--context", "0"]):
        assert cli.main(argv) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("kqsvd: error: ") and err.count("\n") == 1


def test_light_verbs_do_not_import_heavy_packages() -> None:
    code = (
        "import sys; from vllm_kqsvd.cli import main; main(['--help']); main(['inspect', '--help']);"
        "main(['doctor', '--help']); bad = {'torch', 'vllm', 'transformers'} & set(sys.modules); assert not bad, bad"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120, stdout=subprocess.DEVNULL)


def test_a_verb_brings_arguments_and_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    verb = ModuleType("fake_verb")
    verb.add_arguments = lambda parser: parser.add_argument("model")  # type: ignore[attr-defined]
    verb.run = lambda args: seen.append(args.model)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm_kqsvd.calibration.cli", verb)
    monkeypatch.setattr(cli, "import_module", lambda name: sys.modules[name])
    assert cli.main(["calibrate", "M"]) == 0 and seen == ["M"]

    def refuse(args: object) -> int:
        raise CalibrationError("no text")

    verb.run = refuse  # type: ignore[attr-defined]
    assert cli.main(["calibrate", "M"]) == 1


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(name: str) -> ModuleType:
        raise ModuleNotFoundError("No module named 'tqdm'", name="tqdm")

    monkeypatch.setattr(cli, "import_module", missing)
    assert cli.main(["calibrate", "M"]) == 1
    assert "needs the Python package 'tqdm'; pip install tqdm" in capsys.readouterr().err


def test_interruption_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("vllm_kqsvd.inspect_projection.run", interrupt)
    assert cli.main(["inspect", GOLDEN]) == 1
    assert capsys.readouterr().err == "kqsvd: interrupted\n"


def test_inspect_counts_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", GOLDEN, "--json", "--context", "1000"]) == 0
    data = json.loads(capsys.readouterr().out)
    # 16 channels of 8 and of 4 bits and two scale bytes, one head, two layers; plain: 16 * 2 elements of 2 bytes
    assert [e["bytes_per_token"] for e in data["layers"]] == [16 + 8 + 2] * 2
    total = data["total"]
    assert total["bytes_per_token"] == 52 and total["bytes_per_token_bf16"] == 128
    assert total["bits_per_element"] == 16 * 52 / 128
    assert total["bits_per_element_of_layers"] == [6.5, 6.5]
    # a page of 128 latent tokens holds 32 exact ones; a window of 64 to 79 touches up to four
    assert total["window_bytes_per_sequence"] == 4 * 128 * 52
    assert total["compression_ratio"] == pytest.approx(128 * 1000 / (52 * 1000 + 4 * 128 * 52))
    assert data["layers"][0]["group_bits"] == {"k": [8], "v": [4]} and data["layers"][1]["predicted_error"] == 0.25


def test_inspect_prints_a_table(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(model / "kqsvd"), "--model", str(model)]) == 0
    text = capsys.readouterr().out
    assert "page  32  kq/fisher  62      44" in text and "exact window of 64 tokens counted" in text


def test_doctor_finds_all_in_order(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(doctor_checks, "_plugin", lambda: [])  # needs an installed package
    assert cli.main(["doctor", "--model", str(model), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    status = {c["name"]: c["status"] for c in data["checks"]}
    assert data["ok"] and status["projection"] == status["model"] == status["implementation"] == "ok"
    assert data["serve_command"] == f"vllm serve {model} --attention-backend CUSTOM"
    assert cli.main(["doctor", "--model", str(model), "--projection", str(model / "kqsvd")]) == 0
    text = capsys.readouterr().out
    assert f"""--additional-config '{{"kqsvd": {{"projection": "{model}/kqsvd"}}}}'""" in text


def test_doctor_fails_with_1_and_goes_on(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> list[doctor_checks.Check]:
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(doctor_checks, "_implementations", broken)
    monkeypatch.setenv("HOME", str(tmp_path))
    other = write_model(tmp_path / "other", seed=1)
    assert cli.main(["doctor", "--model", str(other), "--projection", str(model / "kqsvd"), "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    details = {c["name"]: (c["status"], c["detail"]) for c in data["checks"]}
    assert details["implementation"][0] == "fail" and "libcudart" in details["implementation"][1]
    assert details["model"][0] == "fail" and "weights" in details["model"][1]
    assert str(tmp_path) not in json.dumps(data)  # the home folder names the user
    assert cli.main(["doctor", "--projection", str(tmp_path)]) == 1
    assert "FAIL  projection" in capsys.readouterr().out


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the projection and the model are looked at; all else is in order."""
    for name in ("_packages", "_plugin", "_registration", "_implementations", "_gpu", "_extension"):
        monkeypatch.setattr(doctor_checks, name, lambda: [])


def doctor(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """(exit code, text) of `kqsvd doctor`."""
    code = cli.main(["doctor", *map(str, arguments)])
    return code, capsys.readouterr().out


def test_doctor_says_what_it_has_not_looked_at(installed: None, model: Path, capsys, monkeypatch) -> None:
    code, text = doctor(capsys)
    assert code == 0 and "the installation is ready; no model was checked" in text
    assert "\nready\nserve with:" in doctor(capsys, "--model", model)[1]
    monkeypatch.setattr(doctor_checks, "_gpu", lambda: [doctor_checks.Check("gpu 0", "warn", "slow")])
    assert "\nready; see WARN above (gpu 0)\n" in doctor(capsys, "--model", model)[1]


def test_doctor_wants_a_model_folder_and_asks_no_hub(installed: None, model: Path, tmp_path: Path, capsys) -> None:
    for name, found in (("org/name", "no such folder"), (tmp_path, "no config.json"), (model / "config.json", "no su")):
        code, text = doctor(capsys, "--model", name, "--projection", GOLDEN)
        assert (
            code == 1 and f"FAIL  model        {name}: {found}" in text and "not ready: see FAIL above (model)" in text
        )
    (tmp_path / "m").mkdir()
    shutil.copy(model / "config.json", tmp_path / "m")
    code, text = doctor(capsys, "--model", tmp_path / "m")
    assert code == 1 and f"no folder {tmp_path}/m/kqsvd; make one with" in text and "then serve with:" in text


def test_doctor_on_other_versions_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    def status(version: str | None) -> str:
        monkeypatch.setattr(doctor_checks, "_vllm", lambda: version)
        return doctor_checks._packages()[-1].status

    assert [status(v) for v in ("0.32.0+cpu", "0.33.1", "0.33.0rc1", "0.34.0", "0.31.2", None)] == [
        "ok", "ok", "ok", "warn", "warn", "fail"
    ]  # fmt: skip


def test_doctor_on_an_extension_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_kqsvd.ops import cuda_library

    broken = tmp_path / "_C.abi3.so"
    broken.write_bytes(b"\x7fELF no library")
    monkeypatch.setattr(cuda_library, "LIBRARY", broken)
    monkeypatch.setattr(cuda_library, "load", cuda_library.load.__wrapped__)
    (found,) = doctor_checks._extension()
    assert (
        found.status == "info" and "does not load into PyTorch" in found.detail and "KQSVD_BUILD_CUDA=1" in found.detail
    )


def test_doctor_on_a_gpu_the_extension_was_not_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_kqsvd.ops import cuda_library

    torch = MagicMock()
    torch.ops.kqsvd.token_positions.side_effect = RuntimeError("CUDA error: no kernel image is available\nmore")
    torch.cuda.get_device_name.return_value = "NVIDIA L4"
    monkeypatch.setattr(cuda_library, "torch", torch)
    for capability, advice in (((8, 9), "it is compiled for sm_90a (H100, H200)"), ((9, 0), cuda_library.BUILD)):
        torch.cuda.get_device_capability.return_value = capability
        why = cuda_library._runs_on.__wrapped__(0)
        assert why == f"NVIDIA L4 cannot run the CUDA extension (CUDA error: no kernel image is available); {advice}"


def test_doctor_explains_an_invisible_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    entries: list[EntryPoint] = []
    monkeypatch.setattr(doctor_checks.metadata, "entry_points", lambda group: [e for e in entries if e.group == group])
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    plugin, metrics = doctor_checks._plugin()
    assert plugin.status == "fail" and "vllm.general_plugins" in plugin.detail and metrics.status == "warn"
    entries.append(EntryPoint("kqsvd", "vllm_kqsvd.plugin:register", "vllm.general_plugins"))
    entries.append(EntryPoint("kqsvd", "vllm_kqsvd.metrics:KQSVDStatLogger", "vllm.stat_logger_plugins"))
    assert [c.status for c in doctor_checks._plugin()] == ["ok", "ok"]
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert doctor_checks._plugin()[0].status == "fail"


def test_doctor_shows_no_secret_user_or_host(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "sk-very-secret")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(doctor_checks, "_user", lambda: "jdoe")
    monkeypatch.setattr(doctor_checks.platform, "node", lambda: "jdoes-laptop")
    monkeypatch.setattr(doctor_checks, "_registration", lambda: [])
    shutil.copytree(model, tmp_path / "m")
    folder = model.parent / "jdoe" / "p"  # outside the home folder
    shutil.copytree(GOLDEN, folder)
    cli.main(["doctor", "--model", str(tmp_path / "m"), "--projection", str(folder)])
    text = capsys.readouterr().out
    assert "VLLM_API_KEY" in text and "sk-very" not in text and str(tmp_path) not in text
    assert "jdoe" not in text and "~/m" in text and "/$USER/p" in text
    assert doctor_checks.private("on jdoes-laptop at /data/jdoe") == "on HOST at /data/$USER"
