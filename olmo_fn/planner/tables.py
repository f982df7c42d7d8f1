"""Estimates in words: tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from olmo_fn.mesh.placement import placements, table
from olmo_fn.planner.accelerators import PRODUCTS, STREAM
from olmo_fn.planner.estimate import RESERVED, Estimate, estimate
from olmo_fn.planner.fit import GIB, remedy
from olmo_fn.planner.memory import PURPOSES
from olmo_fn.planner.plan_input import flags, plan_input
from olmo_fn.train.config import Config
from olmo_fn.train.recipe import parameters, rules
from olmo_fn.train.report import dry_run
from olmo_fn.train.serialize import to_yaml


def columns(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows of cells side by side, the first ``left`` columns flush left.

    >>> print(columns([("a", "10"), ("long", "5")]))
    a     10
    long   5
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def report(cfg: Config) -> str:
    """The whole of a dry run, the answer first. ValueError for a layout that cannot run."""
    found = estimate(plan_input(cfg))
    mesh = found.plan.mesh
    placed = table(placements(parameters(cfg), rules(cfg, mesh), mesh), mesh)
    answer = f"{layout(found)}\n{verdict(found)}"
    config = found.plan.cfg
    return "\n\n".join((answer, placed, memory(found), traffic(found), time(found), dry_run(config), to_yaml(config).rstrip()))


def layout(found: Estimate) -> str:
    """The mesh and how a step is cut into what a rank computes at once."""
    plan, r = found.plan, found.plan.cfg.recipe
    degrees = " x ".join(f"{axis} {n}" for axis, n in plan.mesh.degrees.items() if n > 1) or "one process"
    words = [f"{plan.mesh.size:,} x {found.gpu.name}: {degrees}", f"at once {plan.at_once}"]
    words += [f"accumulate {r.accumulate}"] * (r.accumulate > 1)
    words += [f"{plan.microbatches} micro-batches, {plan.cfg.mesh.pp_schedule}"] * (plan.mesh.pp > 1)
    return ", ".join([*words, f"remat {r.remat}", plan.dtype])


def memory(found: Estimate) -> str:
    """The largest moment of each pipeline rank by purpose, alike ranks together."""
    used = [name for name in PURPOSES if any(peak.memory[name] for peak in found.peaks)]
    rows = [("GiB a rank", *used, "in all", "at")]
    for rank, peak in enumerate(found.peaks):
        cells = [f"{peak.memory[name] / GIB:.2f}" for name in used]
        name = f"stage {rank}" if len(found.peaks) > 1 else "at its peak"
        rows.append((name, *cells, f"{peak.total / GIB:.2f}", peak.when))
    if not any(found.host):
        return columns(rows)
    return f"{columns(rows)}\nand in host memory {max(found.host) / GIB:.2f}, copied there and back in each sweep"


def traffic(found: Estimate) -> str:
    """Collectives of a step on the pipeline rank with the most of them."""
    most = max(found.traffic, key=lambda one: sum(n for key, n in one.items() if key[2] == "bytes"))
    rows = [("a rank and step", "kind", "ranks", "count", "GiB", "MiB each")]
    for axis, kind, unit in sorted(most):
        if unit == "calls":
            count, size = most[axis, kind, "calls"], most[axis, kind, "bytes"]
            each = f"{size / count / 2**20:,.2f}"
            rows.append((axis, kind, f"{found.plan.mesh.degree(axis)}", f"{count:,}", f"{size / GIB:,.3f}", each))
    return columns(rows, left=2) if len(rows) > 1 else "no traffic: one process"


def time(found: Estimate) -> str:
    """Where the time of a step goes, by the model of `olmo_fn.planner.clock`."""
    c = found.clock
    tokens = c.tokens * found.plan.mesh.size
    days = found.plan.cfg.run.steps * c.seconds / 86400
    peaks = f"products at {PRODUCTS:.0%} of the peak, streams at {STREAM:.0%} of the bandwidth"
    sizes = f"{c.attention / 1e12:,.1f} of them attention, {c.moved / 1e9:,.0f} GB moved beside them"
    calls = f"for {c.launches['eager']:,} launches and {c.launches['compiled']:,} calls of compiled functions"
    rows = [
        ("computing", f"{c.computing:.3f} s", peaks),
        ("  products", f"{(c.products + c.attention) / 1e12:,.1f} TFLOP", sizes),
        ("  host", f"{c.host:.3f} s", calls),
        ("waiting for others", f"{c.waiting:.3f} s", "tp, cp, ep, and what weights and gradients take longer than computing"),
        ("optimizer", f"{c.update:.3f} s", ""),
        ("pipeline bubble", f"{c.bubble:.1%}", "of the pipeline's time"),
        ("a step", f"{c.seconds:.3f} s", f"{tokens:,.0f} tokens/s, {c.tokens:,.0f} a device, {c.mfu:.1%} of its peak (MFU)"),
        (f"{found.plan.cfg.run.steps:,} steps", f"{days:,.1f} days", f"{days * 24 * found.plan.mesh.size:,.0f} device-hours"),
    ]
    width, right = max(len(row[0]) for row in rows), max(len(row[1]) for row in rows)
    return "\n".join(f"{name.ljust(width)}  {value.rjust(right)}  {words}".rstrip() for name, value, words in rows)


def verdict(found: Estimate) -> str:
    """Whether it fits, and if not, what would help."""
    have, need = found.gpu.memory / GIB, found.largest.total / GIB
    sizes = f"{need:.1f} GiB of {have:.1f} GiB, of which {RESERVED / GIB:.1f} are left to the system"
    if found.fits:
        return f"fits: {sizes}"
    fitting, least = remedy(found.plan, lambda smaller: estimate(smaller).fits)
    smaller, base = estimate(fitting or least), found.plan.cfg
    words, takes = flags(smaller.plan.cfg, base), f"{smaller.largest.total / GIB:.1f} GiB"
    if fitting:
        return f"does not fit: {sizes}\ntry {words}, which takes {takes}"
    search = f"olmo-fn plan PRESET --gpus {max(8, 8 * found.plan.mesh.size)}"
    return f"does not fit: {sizes}\neven {words} takes {takes}; search: {search}"


def ranking(found: Sequence[Estimate], base: Config) -> str:
    """The best layouts, best first, each with what to type beside what gives ``base``."""
    rows = [("", "tokens/s a device", "step s", "MFU", "bubble", "GiB", "flags")]
    for i, one in enumerate(found):
        c, size = one.clock, f"{one.largest.total / GIB:.1f}"
        cells = (f"{i + 1}", f"{c.tokens:,.0f}", f"{c.seconds:.2f}", f"{c.mfu:.1%}", f"{c.bubble:.1%}", size)
        rows.append((*cells, flags(one.plan.cfg, base)))
    width = max(len(row[-1]) for row in rows)
    return columns([(*row[:-1], row[-1].ljust(width)) for row in rows], left=0)
