# SPDX-License-Identifier: Apache-2.0
"""From statistics to coders: metric, basis and tables of every layer, then plans for all, then steps per plan."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from vllm_kqsvd.calibration.allocate import Table, allocate, catalogue_plans
from vllm_kqsvd.calibration.basis import BASES, NESTED, Basis, make_basis
from vllm_kqsvd.calibration.frames import Frame, distance_law
from vllm_kqsvd.calibration.head_groups import Sharing, cka, share
from vllm_kqsvd.calibration.means import MeanFactors, fixed_means, key_means, logit_mean_energy
from vllm_kqsvd.calibration.metric import kq_metric, metric
from vllm_kqsvd.calibration.model_probe import LayerInfo
from vllm_kqsvd.calibration.parallel import in_order
from vllm_kqsvd.calibration.progressive import layer_ranks
from vllm_kqsvd.calibration.quantizer import distortion_table, fit_quantizer, round_trip, voting
from vllm_kqsvd.calibration.refit import refit_decoder
from vllm_kqsvd.calibration.shaping import axis_gains, emphasis, fit_rotation, shaped_losses
from vllm_kqsvd.calibration.statistics import LayerStatistics
from vllm_kqsvd.calibration.tiers import mixed, mixed_weight, rotate_tiers, tier_rotation
from vllm_kqsvd.codec import SINK_RATIO, LayerCodec, SideCodec
from vllm_kqsvd.errors import CalibrationError
from vllm_kqsvd.ops.reference import decode, encode
from vllm_kqsvd.ops.scale_byte import decode_scale
from vllm_kqsvd.plan import GROUP, LayerPlan, SidePlan

logger = logging.getLogger(__name__)
ROTATED = tuple(  # bases whose equal-bit tiers are rotated
    set(BASES) - {"channel_prune", "hadamard", "identity"}
)
SHAPED = tuple(set(ROTATED) - {"recalkv", "head_merge"})  # and whose rotations no heads share (shaping.py)
PLAN_CHOICES = ("auto", "catalogue", "free")
_TABLE_TOKENS = 2048


@dataclass(frozen=True)
class SolveOptions:
    """basis: name for both sides; center: whether the mean is removed; nested: channels mix only within groups of 16,
    so that groups stay in falling order for a cut (cut.py); window, context: exact recent tokens and text length the
    logit metric assumes; seed of tier rotations and of sample offsets."""

    basis: str = "mix"
    center: bool = True
    nested: bool = False
    max_plans: int = 4
    plans: str = "auto"  # one of PLAN_CHOICES
    window: int = 64
    context: int = 2048
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class Side:
    """One side of a layer before bits are chosen: means, basis, ordinary sample tokens minus mean [n, H, d] float32."""

    name: str
    means: MeanFactors
    basis: Basis
    tokens: torch.Tensor
    table: Table


@dataclass(frozen=True)
class SolvedLayer:
    """A finished coder, its channel variances in metric units per side [H, d], and its predicted logit error."""

    codec: LayerCodec
    spectrum: dict[str, torch.Tensor]
    logit_error: float


class LayerSolver:
    """Solves one layer; the statistics are read once and may be dropped afterwards. rank: channels that may hold
    anything, None for all."""

    def __init__(
        self, layer: LayerInfo, stats: LayerStatistics, frame: Frame, options: SolveOptions, rank: int | None = None
    ) -> None:
        self.layer, self.frame, self.options, self.rank = layer, frame, options, rank
        self._seed = options.seed * 10_007 + layer.index
        gen = torch.Generator().manual_seed(self._seed)
        samples = stats.tokens("k").shape[0]
        self._offsets = torch.randint(0, frame.num_offsets, (samples,), generator=gen)
        self.kq = kq_metric("k", stats, layer, frame, options.window, options.context)
        law = distance_law(options.window, options.context)
        mean = stats.mean("k").cpu()
        gram = stats.query_gram().cpu() * layer.scale**2
        energy = torch.einsum("hde,hed->", self.kq, frame.average(stats.second_moment("k").cpu()))
        self.logit_energy = float(energy - logit_mean_energy(mean, gram, layer.rope, law).sum())
        self.sides = {name: self._side(name, stats) for name in ("k", "v")}

    def _side(self, name: str, stats: LayerStatistics) -> Side:
        frame, options = self.frame, self.options
        sharing = self._sharing(name, stats)
        mean, sink = self._mean_and_sink(name, stats, sharing)
        means = key_means(mean, sink, frame) if name == "k" else fixed_means(mean, sink)
        moment = self._moment(name, stats, mean, means)
        kinds = {
            k: metric(k, name, stats, self.layer, frame, options.window, options.context) for k in self._kinds(stats)
        }
        reference = kinds.get("mix", kinds["kq"])
        weight_gram = None
        if options.basis in ("weight_svd", "lorc") and (weight := self.layer.projection_weight(name)) is not None:
            weight_gram = weight @ weight.mT
            weight_gram = frame.average(weight_gram) if name == "k" else weight_gram
        query_gram = frame.average(stats.query_gram().cpu()) if name == "k" else None
        basis = make_basis(options.basis, moment, reference, kinds, query_gram, weight_gram, sharing, self._seed)
        if self.rank is not None:
            basis = basis.truncated(self.rank)
        tokens = self._tokens(name, stats, means)
        return Side(name, means, basis, tokens, self._table(basis, tokens))

    def _sharing(self, name: str, stats: LayerStatistics) -> Sharing | None:
        """The groups of heads that share a basis, for the bases that have them."""
        if self.options.basis == "recalkv" and name == "k":
            x = stats.tokens("k")
            return share(x, cka(x), self.layer.rope, aligned=False)
        if self.options.basis == "head_merge":  # K and V of a head go together
            similarity = cka(stats.tokens("k")) + cka(stats.tokens("v"))
            return share(stats.tokens(name), similarity, self.layer.rope if name == "k" else None, aligned=True)
        return None

    def _mean_and_sink(
        self, name: str, stats: LayerStatistics, sharing: Sharing | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is subtracted, before RoPE: [H, d] each. Heads without sinks have their mean twice."""
        own, sink = (x.cpu() for x in (stats.mean(name), stats.sink(name)))
        if not self.options.center:
            return torch.zeros_like(own), torch.zeros_like(own)
        if self.options.basis != "head_merge" or sharing is None:
            return own, sink
        mean = sharing.shared_mean(own)
        return mean, torch.where((own == sink).all(-1, keepdim=True), mean, sink)

    def _moment(self, name: str, stats: LayerStatistics, mean: torch.Tensor, means: MeanFactors) -> torch.Tensor:
        """Second moment [H, d, d] in the frame of what is left when `means`, made from `mean`, are removed."""
        frame = self.frame
        if not self.options.center:
            moment = stats.second_moment(name).cpu()
            return frame.average(moment) + means.residual if name == "k" else moment
        own = stats.mean(name).cpu()
        if name == "k" and frame.mode == "post":  # the mean that stays behind is part of the data
            moved, removed = key_means(own, own, frame).mean, means.mean
            rotated = frame.average(own[:, :, None] * own[:, None, :]) - moved.mT @ removed - removed.mT @ moved
            return frame.average(stats.covariance(name).cpu()) + rotated + removed.mT @ removed
        beside = (own - mean)[:, :, None] * (own - mean)[:, None, :]  # where a head's mean is not its own
        moment = stats.covariance(name).cpu() + beside
        return frame.average(moment) + means.residual if name == "k" else moment

    def _kinds(self, stats: LayerStatistics) -> tuple[str, ...]:
        has_gradients = stats.gradient_gram("k") is not None
        return ("kq", "mix", "fisher") if has_gradients or self.options.basis == "fisher" else ("kq", "mix")

    def _tokens(self, name: str, stats: LayerStatistics, means: MeanFactors) -> torch.Tensor:
        """Ordinary sample tokens in the frame, mean removed: [n, H, d] float32, the same n for every head."""
        x = stats.tokens(name).double()
        if name == "k":
            x = self.frame.apply(x, self._offsets)
        mean, sink = means.at(self._offsets)
        centred = x - mean
        is_sink = (x - sink).square().sum(-1) < SINK_RATIO * centred.square().sum(-1)
        count = int((~is_sink).sum(0).min())
        order = torch.argsort(is_sink.to(torch.int8), dim=0, stable=True)[:count]
        chosen = centred.gather(0, order[..., None].expand(-1, -1, x.shape[-1]))
        return chosen.float().to(self.options.device)

    def _table(self, basis: Basis, tokens: torch.Tensor) -> Table:
        """Loss of every group of 16 channels at every code width, [d / 16, 9], summed over the KV heads."""
        dim = basis.encode.shape[1]
        tiers = torch.arange(dim) // GROUP
        shaped = self.options.basis in SHAPED
        if self.options.basis in ROTATED and not shaped:  # measure what tiers will hold: rotated channels
            basis = rotate_tiers(basis, tiers.tolist(), self._seed)
        z = torch.einsum("nhd,hdc->nhc", tokens[:_TABLE_TOKENS], basis.encode.to(tokens))
        weight = basis.weight.to(z)
        if shaped:
            table = shaped_losses(z, basis, tier_rotation(basis.owner, tiers, self._seed), tiers)
        else:
            table = distortion_table(z, voting(z.square().mean(0), weight))
        table = table * weight[..., None].double()
        grouped = table.reshape(table.shape[0], dim // GROUP, GROUP, -1).sum((0, 2))
        return np.asarray(grouped.cpu().numpy(), dtype=np.float64)

    def finish(self, k_plan: SidePlan, v_plan: SidePlan) -> SolvedLayer:
        """The coder of these plans: tiers rotated, steps and guards fitted, error measured with the reference coder."""
        k, v = (self.coder(n, p) for n, p in (("k", k_plan), ("v", v_plan)))
        codec = LayerCodec(k, v, self.frame.rope, self.frame.rope_block).to("cpu")
        logit = float(torch.einsum("hde,hed->", self.kq, self._key_error_gram(codec)))
        spectrum = {n: (s.basis.variance * s.basis.weight).float() for n, s in self.sides.items()}
        return SolvedLayer(codec, spectrum, (max(logit, 0.0) / max(self.logit_energy, 1e-30)) ** 0.5)

    def coder(self, name: str, plan: SidePlan) -> SideCodec:
        """One side's coder under a plan."""
        side = self.sides[name]
        basis = side.basis.first(plan.rank)
        bits = torch.tensor([b for b in plan.group_bits for _ in range(GROUP)])
        axes = torch.einsum("nhd,hdc->nhc", side.tokens, basis.encode.to(side.tokens))
        turn, amplitude = self._mixture(basis, axes, bits)
        mix = mixed(basis, turn, amplitude)
        z = torch.einsum("nhc,hcd->nhd", axes * amplitude.to(axes), turn.to(axes))
        weight, widths = mix.weight.to(z), bits.to(z.device)
        step, scale_weight, guard = fit_quantizer(z, widths, weight, voting(z.square().mean(0), weight))
        decode_ = mix.decode
        if self.options.basis in SHAPED:
            coded = round_trip(z, widths, step, scale_weight, guard)
            gains = axis_gains(torch.einsum("nhc,hdc->nhd", coded, turn.to(z)), axes, amplitude.to(z))
            decode_ = turn.mT @ (gains.double().cpu()[..., None] * basis.decode)
        wide = step.double().cpu()
        coder = SideCodec(
            plan,
            (mix.encode / wide[:, None, :]).float(),
            (decode_ * wide[..., None]).float(),
            scale_weight.float().cpu(),
            guard.float().cpu(),
            side.means.basis.float(),
            side.means.mean.float(),
            side.means.sink.float(),
        )
        return self._refitted(coder, side) if self.options.basis == "recalkv" and name == "v" else coder

    def _mixture(self, basis: Basis, axes: torch.Tensor, bits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(rotation [H, R, R], amplitudes [H, R] before it) of the tiers of a plan with code widths bits [R]."""
        one = torch.ones_like(basis.variance)
        if self.options.basis not in ROTATED:
            return torch.eye(len(bits), dtype=one.dtype).expand(len(one), -1, -1), one
        nested = self.options.nested or self.options.basis in NESTED
        tiers = torch.arange(len(bits)) // GROUP if nested else bits
        turn = tier_rotation(basis.owner, tiers, self._seed + 1)
        if self.options.basis not in SHAPED:
            return turn, one
        amplitude = emphasis(basis.variance * basis.weight, bits, tiers)
        emphasized = axes * amplitude.to(axes)
        vote = voting(emphasized.square().mean(0), mixed_weight(basis, turn, amplitude).to(axes))
        return fit_rotation(emphasized, turn, bits.to(axes.device), tiers.to(axes.device), vote), amplitude

    def _refitted(self, coder: SideCodec, side: Side) -> SideCodec:
        """The coder with its decoder fitted to the codes of the sample tokens."""
        codes, scale = self._codes(coder, side)
        zero = 2.0 ** (coder.channel_bits() - 1) - 0.5
        coded = (codes - zero) * decode_scale(scale)[0][..., None]
        return replace(coder, decode=refit_decoder(coded, side.tokens.cpu(), coder.decode).float())

    def _codes(self, coder: SideCodec, side: Side) -> tuple[torch.Tensor, torch.Tensor]:
        """(codes, scale bytes) of the sample tokens."""
        offsets = self._offsets[: side.tokens.shape[0]]
        return encode(side.tokens.cpu() + side.means.at(offsets)[0].float(), offsets, coder)

    def _key_error_gram(self, codec: LayerCodec) -> torch.Tensor:
        """Second moment of the keys' coding error over the sample tokens, [H, d, d] float64."""
        side = self.sides["k"]
        offsets = self._offsets[: side.tokens.shape[0]]
        x = side.tokens.cpu() + side.means.at(offsets)[0].float()
        error = (decode(*self._codes(codec.k, side), offsets, codec.k) - x).double()
        return torch.einsum("nhd,nhe->hde", error, error) / error.shape[0]


def plans_to_choose_from(
    kind: str, head_dim: int, rope_blocks: set[int], total_bytes: int, quiet: bool = False
) -> list[LayerPlan]:
    """The plans layers may have, empty for any. "catalogue": those with a compiled CUDA decode kernel (CalibrationError
    if there are none); "auto": those if there are any, else free ones, which the Triton kernels decode (with a warning
    unless `quiet`)."""
    if kind == "free":
        return []
    try:
        found = [catalogue_plans(head_dim, block, total_bytes) for block in sorted(rope_blocks)]
    except CalibrationError as e:
        if kind == "catalogue":
            raise
        logger.log(
            logging.DEBUG if quiet else logging.WARNING,
            "no CUDA decode kernel is compiled for this shape, Triton will decode: %s",
            e,
        )
        return []
    return [plan for plan in found[0] if all(plan in other for other in found)]


def make_solvers(
    layers: Sequence[LayerInfo],
    statistics: Sequence[LayerStatistics],
    frames: Sequence[Frame],
    options: SolveOptions,
) -> list[LayerSolver]:
    """Solvers of all layers, metrics, bases and tables included."""
    ranks: Sequence[int | None] = layer_ranks(layers) if options.basis == "lorc" else [None] * len(layers)
    inputs = list(zip(layers, statistics, frames, ranks, strict=True))
    return list(in_order(lambda x: LayerSolver(x[0], x[1], x[2], options, x[3]), inputs, options.device))


def finish(solvers: Sequence[LayerSolver], plans: Sequence[LayerPlan], device: str) -> list[SolvedLayer]:
    """The coders of these plans, one per solver."""
    pairs = list(zip(solvers, plans, strict=True))
    return list(in_order(lambda x: x[0].finish(x[1].k, x[1].v), pairs, device))


def solve(solvers: Sequence[LayerSolver], total_bytes: int) -> list[SolvedLayer]:
    """Coders of all layers, each `total_bytes` of planes per token and KV head."""
    options, head_dim = solvers[0].options, solvers[0].layer.head_dim
    among = plans_to_choose_from(options.plans, head_dim, {s.frame.rope_block for s in solvers}, total_bytes)
    tables = [(s.sides["k"].table, s.sides["v"].table) for s in solvers]
    return finish(solvers, allocate(tables, total_bytes, options.max_plans, among), options.device)
