# SPDX-License-Identifier: Apache-2.0
"""Other bit plans on the bases of finished projections, without their statistics: what does the choice of plans cost?

    python -m benchmarks.fidelity_replan MODEL PROJECTION OUT --data CALIBRATION_TEXT... [--bits 4 3 2.5 2]

PROJECTION has basis `mix` and keeps every latent channel, as 4-bit ones do. Its encode matrices are basis, then a
rotation inside each tier of equal bits, then quantizer steps: the rotation follows from the seed, the steps from the
stored spectrum and the latents' variance over some calibration tokens. Plans are then chosen and steps fitted by the
calibrator itself. Projections whose tiers are shaped (made since 2026-11-24) are refused: their rotations follow from
their statistics, which `kqsvd calibrate --statistics` solves again. Writes OUT/{PROJECTION}-replanned-free (the plans
it had, to see what this way loses) and OUT/{model}-{bits}bit-replanned-compiled. No gradients: minutes on a CPU for a
model of 1.5B parameters.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from vllm_kqsvd.calibration.allocate import Table, allocate, catalogue_plans, layer_loss, plane_bytes
from vllm_kqsvd.calibration.basis import Basis
from vllm_kqsvd.calibration.capture import load_model
from vllm_kqsvd.calibration.collect import CollectOptions, Collector
from vllm_kqsvd.calibration.corpus import Corpus
from vllm_kqsvd.calibration.means import MeanFactors
from vllm_kqsvd.calibration.model_probe import probe
from vllm_kqsvd.calibration.solve import LayerSolver, Side, SolveOptions
from vllm_kqsvd.calibration.tiers import rotate_tiers
from vllm_kqsvd.codec import SINK_RATIO, LayerCodec, SideCodec
from vllm_kqsvd.errors import CalibrationError
from vllm_kqsvd.ops.rope_block import rotate
from vllm_kqsvd.plan import GROUP, LayerPlan
from vllm_kqsvd.projection import LayerEntry, Projection, load_projection, save_projection

Tokens = dict[str, torch.Tensor]  # "k" (before RoPE), "v": [n, H, d]


def sample_tokens(model_dir: Path, data: list[Path], windows: int, length: int, device: str) -> list[Tokens]:
    """Keys and values of every layer at all tokens of the first calibration windows."""
    from transformers import AutoTokenizer

    options = CollectOptions(windows, length, gradient_windows=0, samples=windows * length)
    corpus = Corpus(data, AutoTokenizer.from_pretrained(str(model_dir)), length)
    model = load_model(str(model_dir), device, torch.float32)
    collector = Collector(model, probe(model), corpus, options)
    statistics = collector.run(collector.start({}), range(collector.num_steps))
    return [{side: layer.tokens(side) for side in ("k", "v")} for layer in statistics.layers]


def refuse_shaped(base: Projection) -> None:
    """Raise CalibrationError for a projection whose bases cannot be recovered."""
    if base.calibration.get("tiers") == "shaped":
        raise CalibrationError(
            "the projection's tiers are shaped, so that its bases cannot be recovered; keep its statistics "
            "(kqsvd calibrate --keep-statistics FILE) and solve them again (--statistics FILE)"
        )


def recover_basis(side: SideCodec, spectrum: torch.Tensor, tokens: torch.Tensor, seed: int) -> Basis:
    """The basis of a `mix` coder, whose channels all have weight 1: spectrum [H, d] are its channels' variances,
    tokens [n, H, d] centred and in the frame, seed that of the tier rotation. Exact but for the sampled variances."""
    spectrum = spectrum.double()
    same = torch.eye(spectrum.shape[-1], dtype=torch.float64).expand(len(spectrum), -1, -1)
    tiers = [b for b in side.plan.group_bits for _ in range(GROUP)]
    own = tuple(range(len(spectrum)))  # no heads share a basis
    turn = rotate_tiers(Basis(same, same, spectrum, torch.ones_like(spectrum), own), tiers, seed)
    latents = torch.einsum("nhd,hdc->nhc", tokens.double(), side.encode.double())
    step = (turn.variance / latents.square().mean(0)).sqrt()
    encode = side.encode.double() * step[:, None, :] @ turn.decode
    decode = turn.encode @ (side.decode.double() / step[..., None])
    return Basis(encode, decode, spectrum, torch.ones_like(spectrum), own)


def centred(x: torch.Tensor, side: SideCodec, offsets: torch.Tensor) -> torch.Tensor:
    """Ordinary tokens of x [n, H, d] (in the frame, at in-block offsets [n]) minus their mean, as many per head."""
    rows = side.mean_basis[offsets % side.mean_basis.shape[0]]
    x = x - torch.einsum("nm,hmd->nhd", rows, side.mean)
    shift = torch.einsum("nm,hmd->nhd", rows, side.sink - side.mean)
    is_sink = (x - shift).square().sum(-1) < SINK_RATIO * x.square().sum(-1)
    order = torch.argsort(is_sink.to(torch.int8), dim=0, stable=True)[: int((~is_sink).sum(0).min())]
    return x.gather(0, order[..., None].expand(-1, -1, x.shape[-1]))


class BasisSolver(LayerSolver):
    """A LayerSolver whose bases come from a projection instead of statistics; only `coder` works."""

    def __init__(self, entry: LayerEntry, tokens: Tokens, seed: int) -> None:
        codec, self.options = entry.codec, SolveOptions(seed=seed)
        self._seed = seed * 10_007 + entry.index
        gen = torch.Generator().manual_seed(self._seed)
        offsets = torch.randint(0, max(codec.rope_block, 1), (len(tokens["k"]),), generator=gen)
        self.sides = {}
        for name, side in (("k", codec.k), ("v", codec.v)):
            if side.plan.rank < codec.head_dim or entry.spectrum is None:
                raise CalibrationError(f"{entry.name} keeps {side.plan.rank} channels; take a projection of more bits")
            x = rotate(tokens[name], offsets, codec.rope) if name == "k" and codec.rope_block else tokens[name]
            x = centred(x, side, offsets)
            basis = recover_basis(side, entry.spectrum[name], x, self._seed + 1)
            means = MeanFactors(*(t.double() for t in (side.mean_basis, side.mean, side.sink)), torch.zeros(()))
            self.sides[name] = Side(name, means, basis, x, self._table(basis, x))

    @property
    def tables(self) -> tuple[Table, Table]:
        """Loss tables of K and V."""
        return self.sides["k"].table, self.sides["v"].table


def replan(base: Projection, solvers: list[BasisSolver], plans: list[LayerPlan], kind: str) -> Projection:
    """`base` with other plans: rotations, steps and guards made anew."""
    layers = {}
    for (index, entry), solver, plan in zip(sorted(base.layers.items()), solvers, plans, strict=True):
        coders = solver.coder("k", plan.k), solver.coder("v", plan.v)
        codec = LayerCodec(*coders, entry.codec.rope, entry.codec.rope_block)
        layers[index] = dataclasses.replace(entry, codec=codec)
    bits = plans[0].bits_per_element(base.model.head_dim)
    return Projection(base.model, layers, dict(base.calibration, bits_per_element=bits, plans=kind))


def main() -> None:
    """Sample tokens, recover the bases, write the replanned folders."""
    options = parse()
    base = load_projection(options.projection)
    refuse_shaped(base)
    entries = [e for _, e in sorted(base.layers.items())]
    tokens = sample_tokens(options.model, options.data, options.windows, options.length, options.device)
    seed = int(base.calibration["seed"])
    solvers = [BasisSolver(e, tokens[e.index], seed) for e in entries]
    had = [e.codec.plan for e in entries]
    folder = options.out / f"{options.projection.name}-replanned-free"
    save_projection(replan(base, solvers, had, base.calibration["plans"]), folder)
    tables = [s.tables for s in solvers]
    for bits in options.bits:
        total = plane_bytes(bits, base.model.head_dim)
        plans = allocate(tables, total, among=catalogue_plans(base.model.head_dim, entries[0].rope_block, total))
        loss = sum(layer_loss(p, k, v) for p, (k, v) in zip(plans, tables, strict=True))
        print(f"{bits:g} bits: predicted loss {loss:.4g}", flush=True)
        folder = options.out / f"{options.model.name}-{bits:g}bit-replanned-compiled"
        save_projection(replan(base, solvers, plans, "catalogue"), folder)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("projection", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="calibration text files")
    parser.add_argument("--bits", type=float, nargs="*", default=[4.0, 3.0, 2.5, 2.0])
    parser.add_argument("--windows", type=int, default=6, help="windows of tokens to fit the steps on")
    parser.add_argument("--length", type=int, default=512, help="tokens each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
