# SPDX-License-Identifier: Apache-2.0
"""How much a projection depends on what it was calibrated on: amount and kind of text, LoRA, first tokens.

    python -m benchmarks.robustness MODEL [--studies data domain lora first domain8] [--statistics FILE]

Each measurement reads the first tokens of a held-out text exactly and decodes its last ones from the cache, with the
window and the class-bit sinks that are served (`kqsvd verify`). Rows are appended to benchmarks/results/robustness.csv
as they come; what is there already is not measured again. Calibrations are kept in build/robustness. `--statistics`:
of an earlier `kqsvd calibrate --keep-statistics` of 64 windows of the mixed text, instead of reading them again.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.fidelity import installed, shown
from benchmarks.robustness_text import FOLDER, KINDS, calibration_text, held_out_text
from vllm_kqsvd.calibration.calibrate import CalibrateOptions, collect_statistics
from vllm_kqsvd.calibration.collect import CollectOptions
from vllm_kqsvd.calibration.reuse import solve_again
from vllm_kqsvd.projection import Projection, load_projection, save_projection
from vllm_kqsvd.verify import load_model, projection_codec
from vllm_kqsvd.verify_harness import ReadRule, Reference, Score, Window, score
from vllm_kqsvd.verify_result import rms

RESULTS = Path(__file__).parent / "results" / "robustness.csv"
KEY = ("model", "study", "setting", "text", "bits", "context")
COLUMNS = (
    "date device versions command model study setting text bits context kl kl_se top1 perplexity perplexity_bf16"
    " logit_error predicted_logit_error"
).split()
SMALL = 8  # windows of 2048 tokens, what most studies calibrate on
RANK = 16  # of the adapter
OPENINGS = {"nothing": "", "BOS": None, "digit": "1984 ", "line break": "\n", "chat template": "chat"}


@dataclass(frozen=True)
class Case:
    """One projection on one text. calibrated: kind of text ("mixed": prose, code and one chat in eight), windows and
    the folder of the model it was made for; measured: with the model in `served`, the text opened by `opening`."""

    study: str
    setting: str
    text: str
    kind: str = "mixed"
    windows: int = SMALL
    calibrated: str = ""
    served: str = ""
    opening: str = "nothing"


def cases() -> Iterator[Case]:
    """Everything the studies measure."""
    yield from (Case("data", f"{n}", text, windows=n) for n in (64, 1, 4, 8) for text in KINDS)
    yield from (Case("domain", kind, text, kind, windows=1) for kind in reversed(KINDS) for text in KINDS)
    yield from (Case("first", opening, "prose", windows=64, opening=opening) for opening in OPENINGS)
    for text in KINDS[:2]:
        yield Case("lora", "5 %, calibrated without it", text, served="0.05")
        yield Case("lora", "20 %, calibrated without it", text, served="0.2")
        yield Case("lora", "20 %, calibrated with it", text, calibrated="0.2", served="0.2")
    yield from (Case("data", f"{n}", text, windows=n) for n in (2, 16) for text in KINDS)
    yield from (Case("domain8", kind, text, kind) for kind in KINDS for text in KINDS)


class Lab:
    """Models, calibrations and exact passes, each made once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.tokenizer = AutoTokenizer.from_pretrained(options.model)
        self._model: tuple[str, torch.nn.Module] | None = None
        self._exact: dict[tuple[str, str, str], Reference] = {}

    def folder(self, adapter: str) -> Path:
        """The model's folder, with a random adapter of this size merged into its attention weights if one is named."""
        if not adapter:
            return self.options.model
        path = FOLDER / f"{self.options.model.name}-lora-{adapter}"
        if not (path / "config.json").exists():
            model = AutoModelForCausalLM.from_pretrained(self.options.model, dtype=torch.float32)
            merge_adapter(model, float(adapter))
            model.save_pretrained(path)
            self.tokenizer.save_pretrained(path)
        return path

    def projection(self, case: Case, bits: float) -> Projection:
        """What `kqsvd calibrate` makes of the case's text."""
        model = self.folder(case.calibrated)
        name = f"{model.name}-{case.kind}-{case.windows}"
        statistics, target = FOLDER / f"{name}.stats", FOLDER / f"{name}-{bits:g}bit"
        if (case.kind, case.windows, case.calibrated) == ("mixed", 64, "") and self.options.statistics:
            statistics = self.options.statistics
        if not target.exists():
            if not statistics.exists():
                kinds = ("prose", "code") if case.kind == "mixed" else (case.kind,)
                files = [calibration_text(kind, self.tokenizer) for kind in kinds]
                collect_statistics(model, files, collect_options(case))[0].save(statistics)
            save_projection(
                solve_again(model, statistics, CalibrateOptions(bits=bits, layer_budgets="equal"), "cpu"), target
            )
        return load_projection(target)

    def window(self, case: Case) -> Window:
        """The beginning of the held-out text behind the opening."""
        text, opening = held_out_text(case.text, self.tokenizer)[: 12 * self.options.context], OPENINGS[case.opening]
        if opening == "chat":
            text = self.tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
        ids = self.tokenizer((opening or "") + text if opening != "chat" else text, add_special_tokens=False).input_ids
        if opening is None:
            ids = [self.tokenizer.bos_token_id, *ids]
        context = self.options.context
        assert len(ids) >= context, f"{case.text} holds {len(ids)} tokens"
        return Window(torch.tensor(ids[:context]), case.text, context - self.options.scored)

    def measure(self, case: Case, bits: float) -> tuple[Projection, Score]:
        """The projection and its scores."""
        found = self.projection(case, bits)
        if self._model is None or self._model[0] != case.served:
            self._model = case.served, load_model(self.folder(case.served), "cpu", torch.float32)[0]
            self._exact.clear()
        model, key = self._model[1], (case.served, case.text, case.opening)
        if key not in self._exact:
            self._exact[key] = Reference(model, self.window(case))
        exact = self._exact[key]
        rule = ReadRule(64, prefill=exact.window.first_scored)
        return found, score(model, exact.window, exact, projection_codec(found), rule)


def collect_options(case: Case) -> CalibrateOptions:
    """The defaults, with fewer windows and as many gradients in proportion (at least one)."""
    gradients = min(CollectOptions.gradient_windows, max(1, case.windows // 2))
    return CalibrateOptions(
        collect=CollectOptions(num_windows=case.windows, gradient_windows=gradients, chat=case.kind == "mixed")
    )


@torch.no_grad()
def merge_adapter(model: torch.nn.Module, size: float, seed: int = 0) -> None:
    """Add a random matrix of rank RANK to every attention projection, `size` times its weight in Frobenius norm."""
    gen = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj", "o_proj"):
            rows, columns = module.weight.shape
            change = torch.randn(rows, RANK, generator=gen) @ torch.randn(RANK, columns, generator=gen)
            module.weight += change * (size * module.weight.norm() / change.norm())


def row(case: Case, bits: float, found: Projection, one: Score, options: argparse.Namespace) -> dict[str, object]:
    """One line of the CSV; kl_se is the standard error over the predicted tokens."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": f"cpu {platform.machine()}",
        "versions": "; ".join(f"{p} {installed(p)}" for p in ("vllm_kqsvd", "torch", "transformers")),
        "command": "python -m benchmarks.robustness " + shlex.join(shown(sys.argv[1:])),
        "model": options.model.name,
        "study": case.study,
        "setting": case.setting,
        "text": case.text,
        "bits": f"{bits:g}",
        "context": options.context,
        "kl": f"{float(one.kl.mean()):.6f}",
        "kl_se": f"{float(one.kl.std()) / one.kl.numel() ** 0.5:.6f}",
        "top1": f"{float(one.agree.mean()):.4f}",
        "perplexity": f"{float(one.nll.mean().exp()):.4f}",
        "perplexity_bf16": f"{float(one.nll_reference.mean().exp()):.4f}",
        "logit_error": f"{rms(one.logit_error.values()):.4f}",
        "predicted_logit_error": f"{rms(found.predicted):.4f}",
    }


def main() -> None:
    """Measure what is missing and append it."""
    options = parse()
    torch.set_num_threads(options.threads)
    FOLDER.mkdir(parents=True, exist_ok=True)
    done: set[tuple[str, ...]] = set()
    if options.output.exists():
        with options.output.open(newline="") as f:
            done = {tuple(r[k] for k in KEY) for r in csv.DictReader(f)}
    todo = [(c, b) for b in options.bits for c in cases() if c.study in options.studies]
    lab = Lab(options)
    with options.output.open("a", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        if f.tell() == 0:
            writer.writeheader()
            f.flush()
        for case, bits in tqdm(todo, desc="measuring", unit="row"):
            key = (options.model.name, case.study, case.setting, case.text, f"{bits:g}", str(options.context))
            if key not in done:
                writer.writerow(row(case, bits, *lab.measure(case, bits), options))
                f.flush()


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face folder with a chat template")
    parser.add_argument("--studies", nargs="+", default=["data", "domain", "lora", "first", "domain8"])
    parser.add_argument("--bits", type=float, nargs="+", default=[3.0, 4.0])
    parser.add_argument("--statistics", type=Path, help="of 64 windows of the mixed text")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--scored", type=int, default=256, help="last tokens of the context that are decoded")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
