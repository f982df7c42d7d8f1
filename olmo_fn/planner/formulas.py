"""Closed formulas for the memory and the time of a rank: quick, rough, and used for nothing but the order of candidates.

What a plan says comes from a trace of the step. `olmo_fn.planner.search` orders thousands of layouts by these formulas to trace
few, and `olmo_fn.planner.fit` leaves out the trace where there is far more memory than they want. They are those of Megatron-LM
(Korthikanti et al. 2022, arXiv 2205.05198, section 4): parameters, gradients, optimizer, activations a token and layer, logits;
and FLOPs over the peak, bytes over a bandwidth. They read the specs of a chain's stages; a test holds them against the trace.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from olmo_fn import tree
from olmo_fn.kernels.attention_sight import TILE
from olmo_fn.models.count import flops_per_sequence
from olmo_fn.nn.cross_entropy import LOGITS_ROWS
from olmo_fn.planner.accelerators import PRODUCTS, STREAM
from olmo_fn.planner.clock import collective
from olmo_fn.planner.plan_input import Label, PlanInput, by_label, without_layout
from olmo_fn.spec import abstract
from olmo_fn.train.accelerators import Accelerator
from olmo_fn.train.config import Config
from olmo_fn.train.recipe import parameters, recipe

WITHIN = 2.0  # a trace finds at most so many times the bytes


class Sizes(NamedTuple):
    """Of one label: entries of its parameters, those of experts among them, and what its matrices take in and give out for a
    token: those of experts for each of the experts that it goes to.
    """

    parameters: int
    experts: int
    widths: int


@lru_cache(64)
def sizes(cfg: Config) -> tuple[dict[Label, Sizes], float]:
    """The sizes by label, and bytes of optimizer state a parameter."""
    specs, step, found = parameters(cfg), recipe(cfg), dict[Label, Sizes]()
    assert step.grads.chain is not None
    for label, stages in by_label(step.grads.chain.stages).items():
        leaves = [spec for stage in stages for path in stage.paths for _, spec in tree.items(tree.at(specs, path), path)]
        times = getattr(cfg.model.layers[label].feed_forward, "top_k", 1) if isinstance(label, int) else 1
        many = [spec for spec in leaves if "experts" in spec.axes]
        widths = sum(sum(spec.shape[-2:]) for spec in leaves if len(spec.shape) == 2) + times * sum(
            sum(s.shape[-2:]) for s in many
        )
        found[label] = Sizes(sum(spec.size for spec in leaves), sum(spec.size for spec in many), widths)
    slots = step.init(abstract(specs)).slots
    slot_bytes = sum(x.nbytes for slot in slots.values() for _, x in tree.items(slot))
    return found, slot_bytes / sum(spec.size for _, spec in tree.items(specs))


def memory(plan: PlanInput) -> float:
    """Bytes of the fullest rank at its largest moment."""
    return max(_rank_memory(plan, rank) for rank in {0, plan.mesh.pp - 1})


def _rank_memory(plan: PlanInput, rank: int) -> float:
    model, r, mesh, how = plan.cfg.model, plan.cfg.recipe, plan.mesh, plan.cut.pipeline
    (by, slots), held, item = sizes(without_layout(plan.cfg)), plan.held(rank), 2 if plan.dtype == "bfloat16" else 4
    tokens = plan.rows * r.sequence_length / mesh.cp
    rest = sum(by[label].parameters for label in held) / mesh.tp * (4 + slots + 4) / mesh.degree("fsdp")
    used = [(by[label].parameters - by[label].experts * (1 - 1 / mesh.ep)) / mesh.tp for label in held]
    entries, largest = sum(used), max(used)
    if mesh.pp > 1:
        in_use = entries * (item + 4)  # gathered weights and whole gradients, for the whole step
    else:
        in_use = (entries if plan.cfg.mesh.keep_gathered else 2 * largest) * item + 2 * 4 * largest
        if mesh.degree("fsdp") > 1 == mesh.degree("edp"):  # experts that no other rank has are copied once, and never gathered
            in_use += sum(by[label].experts for label in held) / mesh.tp / mesh.ep * (item if item < 4 else 0)
    layer = max((by[label].widths for label in held if isinstance(label, int)), default=0) * item * tokens / mesh.tp
    stream = model.d_model * item * tokens / mesh.tp
    layers = sum(isinstance(label, int) for label in held) / how.chunks
    whole = 2 * model.d_model * item * tokens * (1 - 1 / mesh.tp)  # gathered for the products of attention and feed-forward
    in_flight = mesh.pp + ((mesh.pp - 1) / how.chunks if how.chunks > 1 else 0)
    at_once = plan.microbatches if how.kind == "gpipe" else min(plan.microbatches, in_flight)
    kept = at_once * layers * how.chunks * {"full": stream, "selective": 2 * stream}.get(r.remat, layer + whole)
    head = 8 * min(tokens, LOGITS_ROWS[1]) * model.vocab_size / mesh.tp + 2 * stream
    heads = max(getattr(block.mixer, "n_heads", 0) for block in model.layers)
    tiles = 16 * tokens * heads * min(TILE, r.sequence_length) / mesh.tp
    return rest + in_use + kept + max(head, layer + whole + tiles)


def seconds(plan: PlanInput, gpu: Accelerator) -> float:
    """Seconds of a step: products, streams and collectives of an average rank, and the pipeline's bubble."""
    model, r, mesh, how = plan.cfg.model, plan.cfg.recipe, plan.mesh, plan.cut.pipeline
    (by, slots), item = sizes(without_layout(plan.cfg)), 2 if plan.dtype == "bfloat16" else 4
    full = r.remat in ("full", "selective")
    blocks = [one for label, one in by.items() if isinstance(label, int)]
    times, entries = r.accumulate * plan.microbatches, sum(one.parameters for one in by.values()) / mesh.pp / mesh.tp
    experts = sum(one.experts for one in by.values()) / mesh.pp / mesh.tp
    sent = entries - experts if mesh.ep > 1 else entries  # over fsdp; experts over the rest of it
    tokens, layers = plan.rows * r.sequence_length / mesh.cp, len(blocks) / mesh.pp
    stream, layer = model.d_model * item * tokens, blocks[-1].widths * item * tokens / mesh.tp
    products = flops_per_sequence(model, r.sequence_length) * r.batch_size / mesh.size * (4 / 3 if full else 1)
    moved = times * layers * layer * (6 if full else 4)
    computing = products / (PRODUCTS * gpu.peak) + moved / (STREAM * gpu.bandwidth)
    sweeps = 3 if full else 2

    def travels(axis: str, kind: str, calls: float, size: float) -> float:
        return collective(mesh, axis, kind, calls, calls * size, gpu) if mesh.degree(axis) > 1 else 0.0

    waited = travels("tp", "all_gather", 4 * sweeps * times * layers, stream)
    waited += travels("cp", "all_gather", 2 * sweeps * times * layers, stream * mesh.cp / mesh.tp)
    once = 1 if mesh.pp > 1 else r.accumulate  # a pipeline gathers once for all its micro-batches
    gathers = 1 if mesh.pp > 1 or plan.cfg.mesh.keep_gathered else 2
    beside = travels("fsdp", "all_gather", gathers * once * layers, item * sent / layers)
    beside += travels("fsdp", "reduce_scatter", once * layers, 4 * sent / layers)
    if mesh.ep > 1:
        beside += travels("edp", "all_gather", gathers * once * layers, item * experts / mesh.ep / layers)
        beside += travels("edp", "reduce_scatter", once * layers, 4 * experts / mesh.ep / layers)
        top_k = max(getattr(block.feed_forward, "top_k", 0) for block in model.layers)
        waited += travels("ep", "all_to_all", 2 * sweeps * times * layers, min(top_k, mesh.ep) * stream)
    beside += travels("dp_replicate", "all_reduce", once * layers, 4 * entries / mesh.degree("fsdp") / layers)
    update = (2 * (4 + slots) + 8) * entries / mesh.degree("fsdp") / (STREAM * gpu.bandwidth)
    if mesh.pp == 1:
        return max(computing + waited, beside) + update
    idle = (mesh.pp - 1) / (how.chunks * plan.microbatches)  # of what it is busy
    sends = travels("pp", "send", 2 * (mesh.pp - 1), stream / mesh.tp)
    return (computing + waited) * (1 + idle) + sends + beside + update
