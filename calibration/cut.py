# SPDX-License-Identifier: Apache-2.0
"""`kqsvd cut`: a projection of fewer bits from a projection, without model, text or statistics (MatryoshkaKV's nested
budgets, arXiv 2410.14731).

The file holds its channels in order of importance and their energies before bits were chosen, so the bits can be chosen
again; every step widens by the ratio of the two widths' best Gaussian steps. What a cut lacks are the sample tokens:
distortions are those of Gaussian channels, steps and guards are not fitted anew, and channels that the file has mixed
because they had equal widths stay mixed (not with `kqsvd calibrate --nested`). Solving the kept statistics again
(`--statistics`) has all of it.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from vllm_kqsvd.calibration.allocate import Table, allocate, plane_bytes, side_losses
from vllm_kqsvd.calibration.budget import add_budget, bits_asked
from vllm_kqsvd.calibration.quantizer import GAUSSIAN_ERROR, GAUSSIAN_STEP
from vllm_kqsvd.calibration.solve import PLAN_CHOICES, plans_to_choose_from
from vllm_kqsvd.codec import LayerCodec, SideCodec
from vllm_kqsvd.errors import CalibrationError
from vllm_kqsvd.plan import GROUP, SidePlan
from vllm_kqsvd.projection import LayerEntry, Projection, load_projection, save_projection


def group_energy(spectrum: torch.Tensor, plan: SidePlan, nested: bool) -> torch.Tensor:
    """Energy of each kept group in metric units: [H, groups] float64; spectrum [H, d].

    Unless nested, the groups of one width were mixed with each other and have equal shares of their energy.
    """
    kept = spectrum[:, : plan.rank].double().reshape(len(spectrum), -1, GROUP).sum(-1)
    if nested:
        return kept
    widths = torch.tensor(plan.group_bits)
    return torch.stack([kept[:, widths == w].mean(-1) for w in plan.group_bits], -1)


def gaussian_table(spectrum: torch.Tensor, plan: SidePlan, nested: bool) -> Table:
    """Loss [d / 16, 9] of every group at every width as if its channels were Gaussian; infinite where the file has no
    such group, so that it stays dropped."""
    table = np.full((spectrum.shape[-1] // GROUP, len(GAUSSIAN_ERROR)), np.inf)
    table[:, 0] = spectrum.double().sum(0).reshape(-1, GROUP).sum(-1).numpy()
    energy = group_energy(spectrum, plan, nested).sum(0).numpy()
    table[: len(energy)] = energy[:, None] * np.asarray(GAUSSIAN_ERROR)
    return table


def cut_side(side: SideCodec, plan: SidePlan, energy: torch.Tensor) -> SideCodec:
    """The same coder with fewer channels or bits: plan keeps a prefix of the side's groups; energy: of `group_energy`.

    Ranges shrink with the codes, so guards grow, up to where they cost more than they save (quantizer.fit_quantizer).
    """
    if plan == side.plan:
        return side
    old = side.channel_bits()[: plan.rank]
    new = torch.tensor(plan.group_bits).repeat_interleave(GROUP)
    steps = torch.tensor(GAUSSIAN_STEP, dtype=side.encode.dtype)
    wider = steps[new] / steps[old]
    votes = (side.scale_weight > 0).sum(-1, keepdim=True)
    weight = side.scale_weight[:, : plan.rank]
    left = (weight > 0).sum(-1, keepdim=True).clamp_min(1)  # the scale is a mean over the channels that vote
    noise = energy[:, : plan.num_groups].repeat_interleave(GROUP, -1) * steps[new].double().square()
    limit = 2 * (noise / noise.sum(-1, keepdim=True).clamp_min(1e-30)).sqrt()
    guard = side.guard_weight[:, : plan.rank] * 2.0 ** (old - new)
    return replace(
        side,
        plan=plan,
        encode=(side.encode[..., : plan.rank] / wider).contiguous(),
        decode=(side.decode[:, : plan.rank] * wider[:, None]).contiguous(),
        scale_weight=weight * wider.square() * (votes / left),
        guard_weight=guard.minimum(limit.to(guard)),
    )


def cut(projection: Projection, bits: float, plans: str | None = None, max_plans: int | None = None) -> Projection:
    """The projection at `bits` per element. plans, max_plans: as in CalibrateOptions, by default the file's own.

    `predicted` grows as the Gaussian losses of the keys do. Raises CalibrationError if the file has no more bits than
    are asked for, no spectra, or no plan fits.
    """
    entries, known = list(projection.layers.values()), projection.calibration
    head_dim = projection.model.head_dim
    total = plane_bytes(bits, head_dim)
    have = min((e.codec.plan.bytes_per_token for e in entries), default=0) - 2
    if total >= have:
        raise CalibrationError(
            f"{bits:g} bits per element asked for, the projection's smallest layer has "
            f"{8 * (have + 2) / (2 * head_dim):g} with scales; a cut only takes bits away, so calibrate for more"
        )
    if any(not e.spectrum or set(e.spectrum) != {"k", "v"} for e in entries):
        raise CalibrationError("the projection holds no spectra to choose bits by; calibrate again")
    nested = known.get("nested") is True
    tables = [(_table(e, "k", nested), _table(e, "v", nested)) for e in entries]
    kind = plans or str(known.get("plans", "auto"))
    among = plans_to_choose_from(kind, head_dim, {e.rope_block for e in entries}, total)
    among = [p for p in among if all(np.isfinite(side_losses(p.k, k) + side_losses(p.v, v)) for k, v in tables)]
    if kind == "catalogue" and not among:
        raise CalibrationError(
            "no compiled plan of this size keeps only channels that the projection has; use --plans free, or calibrate"
        )
    chosen = allocate(tables, total, max_plans or int(known.get("max_plans", 4)), among)
    layers, predicted = {}, []
    for n, (entry, plan, (table, _)) in enumerate(zip(entries, chosen, tables, strict=True)):
        codec = entry.codec
        assert entry.spectrum is not None
        k, v = (
            cut_side(side, new, group_energy(entry.spectrum[name], side.plan, nested))
            for name, side, new in (("k", codec.k, plan.k), ("v", codec.v, plan.v))
        )
        layers[entry.index] = replace(entry, codec=LayerCodec(k, v, codec.rope, codec.rope_block))
        if projection.predicted:
            more = side_losses(plan.k, table) / max(side_losses(codec.k.plan, table), 1e-300)
            predicted.append(projection.predicted[n] * max(1.0, more) ** 0.5)
    about: dict[str, object] = {
        "bits": bits,
        "bits_per_element": 8 * (total + 2) / (2 * head_dim),
        "plans": kind,
        "cut_from": projection.digest,
        "layer_budgets": "equal",
        "layer_budgets_reason": "equal: a cut gives every layer the same bytes",
    }
    return Projection(projection.model, layers, known | about, predicted)


def _table(entry: LayerEntry, side: str, nested: bool) -> Table:
    assert entry.spectrum is not None
    return gaussian_table(entry.spectrum[side], getattr(entry.codec, side).plan, nested)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `kqsvd cut`."""
    parser.add_argument("projection", type=Path, metavar="DIR", help="projection folder of more bits")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR2", help="projection folder to write")
    add_budget(parser, required=True)
    parser.add_argument("--plans", choices=PLAN_CHOICES, help="as in `kqsvd calibrate` (default: as DIR was made)")
    parser.add_argument("--max-plans", type=int, help="distinct bit plans (default: as DIR was made)")


def run(args: argparse.Namespace) -> int:
    """Entry point of the command."""
    from vllm_kqsvd.calibration.cli import check_output, summary

    check_output(args.output)
    if args.output.exists() and args.output.resolve() == args.projection.resolve():
        raise CalibrationError(f"--output {args.output} is the projection to cut; choose another folder")
    projection = load_projection(args.projection)
    found = cut(projection, bits_asked(args, projection.model.head_dim), args.plans, args.max_plans)
    print(summary(found, args.output, save_projection(found, args.output)))
    return 0
