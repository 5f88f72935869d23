# SPDX-License-Identifier: Apache-2.0
"""What the coding of layers costs the model's output: KL on short windows of calibration text.

One layer alone coded tells its sensitivity; all layers coded tell which of two projections is better.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from vllm_kqsvd.calibration.corpus import CHAT_EVERY, Corpus
from vllm_kqsvd.calibration.layer_budgets import Verdict
from vllm_kqsvd.codec import LayerCodec
from vllm_kqsvd.verify_harness import ProjectionCodec, ReadRule, Reference, Window, score

CONTEXT = 512
CHOOSING_SCORED, JUDGING_SCORED = 96, 128  # last tokens of a window that are scored
MAX_FILES = 4
_NGRAM, _TRIES = 12, 64
_BLOCK = 32  # tokens whose mean is one observation of the standard error


def budget_texts(corpus: Corpus, first: int, choosing: int = 2, judging: int = 6) -> dict[str, torch.Tensor]:
    """Windows `choose` and `judge` [n, CONTEXT] int64 of plain text from window `first` of the corpus on, the files in
    turn (`choose_file`, `judge_file` [n]); no stretch of `choose` comes back in `judge`. Fewer where text is short."""
    files = min(len(corpus.files), MAX_FILES)
    wanted = {"choose": max(choosing, files), "judge": max(judging, files)}
    found: dict[str, list[tuple[int, list[int]]]] = {name: [] for name in wanted}
    seen: set[tuple[int, ...]] = set()
    for index in range(first, first + _TRIES * len(corpus.files)):
        file = index % len(corpus.files)
        if file >= files or (corpus.chat and index % CHAT_EVERY == CHAT_EVERY - 1):
            continue
        name = next((n for n, most in wanted.items() if _of_file(found[n], file) < -(-most // files)), None)
        if name is None:
            continue
        ids = corpus.window(index)[:CONTEXT]
        grams = {tuple(ids[i : i + _NGRAM]) for i in range(len(ids) - _NGRAM)}
        if len(grams & seen) > 0.05 * len(grams):
            continue
        seen |= grams
        found[name].append((file, ids))
    out = {}
    for name, windows in found.items():
        out[name] = torch.tensor([ids for _, ids in windows], dtype=torch.int64)
        out[f"{name}_file"] = torch.tensor([file for file, _ in windows], dtype=torch.int64)
    return out


def _of_file(windows: list[tuple[int, list[int]]], file: int) -> int:
    return sum(f == file for f, _ in windows)


def _windows(texts: Mapping[str, torch.Tensor], name: str, scored: int) -> list[Window]:
    rows, files = texts[name], texts[f"{name}_file"].tolist()
    scored = min(scored, rows.shape[-1] // 4) if len(files) else 0
    return [Window(ids, str(f), ids.numel() - scored) for ids, f in zip(rows, files, strict=True)]


def sensitivities(
    model: PreTrainedModel, texts: Mapping[str, torch.Tensor], codecs: Mapping[int, LayerCodec], exact_window: int
) -> NDArray[np.float64] | None:
    """KL of the model with one layer alone coded, for every layer of `codecs` in order, up to a common factor.

    The geometric mean over windows: they agree on layers far better than on the sum. None without windows.
    """
    logs = []
    for window in _windows(texts, "choose", CHOOSING_SCORED):
        start = window.first_scored
        rule = ReadRule(exact_window, prefill=start)
        with _recorded_blocks(model, list(codecs), start) as blocks:
            exact = Reference(model, window)
        kl = []
        for layer, codec in codecs.items():
            with blocks.skipped_below(layer):
                kl.append(float(score(model, window, exact, ProjectionCodec({layer: codec}), rule).kl.mean()))
        one = np.log(np.maximum(kl, 1e-12))
        logs.append(one - one.mean())
    return np.exp(np.mean(logs, 0)) if logs else None


def judge(
    model: PreTrainedModel,
    texts: Mapping[str, torch.Tensor],
    equal: Mapping[int, LayerCodec],
    unequal: Mapping[int, LayerCodec],
    exact_window: int,
) -> Verdict | None:
    """Both sets of coders on the windows that chose nothing; None without such windows."""
    kl: dict[str, list[torch.Tensor]] = {}
    for window in _windows(texts, "judge", JUDGING_SCORED):
        rule = ReadRule(exact_window, prefill=window.first_scored)
        exact = Reference(model, window)
        both = [score(model, window, exact, ProjectionCodec(codecs), rule).kl for codecs in (equal, unequal)]
        kl.setdefault(window.text, []).append(torch.stack(both))
    if not kl:
        return None
    files = [torch.cat(parts, 1) for parts in kl.values()]
    change = max(float(f[1].mean() / f[0].mean().clamp_min(1e-30)) - 1 for f in files)
    every = [part[0] - part[1] for parts in kl.values() for part in parts]
    blocks = torch.stack([piece.mean() for one in every for piece in one.split(_BLOCK)])
    error = float(blocks.std() / len(blocks) ** 0.5) if len(blocks) > 1 else float("inf")
    means = torch.cat(files, 1).mean(1).tolist()
    return Verdict(means[0], means[1], error, change)


class _Blocks:
    """The decoder blocks that hold the attention layers, and what each returned for the rows from `start` on."""

    def __init__(self, modules: dict[int, nn.Module]) -> None:
        self.modules, self.returned = modules, dict[int, Any]()

    @contextmanager
    def skipped_below(self, layer: int) -> Iterator[None]:
        """Blocks before the layer's, which see nothing of its coding, return what they returned in the exact pass."""
        below = {n: m for n, m in self.modules.items() if n < layer and n in self.returned}
        for n, module in below.items():
            module.forward = lambda *_, _out=self.returned[n], **__: _out  # type: ignore[method-assign]
        try:
            yield
        finally:
            for module in below.values():
                del module.forward


@contextmanager
def _recorded_blocks(model: PreTrainedModel, layers: Sequence[int], start: int) -> Iterator[_Blocks]:
    """Within the block, what decoder blocks return for rows from `start` on is kept."""
    blocks = _Blocks(_decoder_blocks(model, layers))
    handles = []
    for n, module in blocks.modules.items():

        def keep(_module: nn.Module, _args: Any, out: Any, n: int = n) -> None:
            blocks.returned[n] = (out[0][:, start:], *out[1:]) if isinstance(out, tuple) else out[:, start:]

        handles.append(module.register_forward_hook(keep))
    try:
        yield blocks
    finally:
        for handle in handles:
            handle.remove()


def _decoder_blocks(model: PreTrainedModel, layers: Sequence[int]) -> dict[int, nn.Module]:
    """The block of every layer by its number: `layers[n]` of the decoder, where it has such a list; else none."""
    decoder = getattr(model, "model", model.base_model)
    blocks = getattr(decoder, "layers", None)
    if not isinstance(blocks, nn.ModuleList) or len(blocks) <= max(layers):
        return {}
    return dict(enumerate(blocks))
