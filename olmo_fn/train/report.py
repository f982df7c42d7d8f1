"""What a run says in words: the dry run, and the end."""

from __future__ import annotations

import shlex
from itertools import pairwise

from olmo_fn import tree
from olmo_fn.data.source import HELDOUT
from olmo_fn.models import transformer
from olmo_fn.models.count import flops_per_token, num_active_params, num_non_embedding_params, num_params
from olmo_fn.train.config import Config
from olmo_fn.train.loop import FAILURE, OBSERVER, Result
from olmo_fn.train.observers.console import mute
from olmo_fn.train.recipe import is_trained, parameters, recipe
from olmo_fn.train.schedule import sizes
from olmo_fn.train.session import abstract_state


def dry_run(cfg: Config) -> str:
    """Counts of parameters, tokens and FLOPs, and memory of the state, without allocating anything."""
    step = recipe(cfg)  # a wrong one is refused here too
    r, total, specs = cfg.recipe, num_params(cfg.model), tree.flatten(parameters(cfg))
    active = num_active_params(cfg.model)
    trained = sum(spec.size for path, spec in specs.items() if is_trained(cfg, path))
    slots = abstract_state(step, parameters(cfg))["slots"]
    kept = {name: sum(x.nbytes for _, x in tree.items(slot)) for name, slot in slots.items()}
    parts = {"parameters": 4 * sum(spec.size for spec in specs.values()), "gradients": 4 * trained}
    parts |= {name: size for name, size in kept.items() if size > 1e6}
    largest = max((spec.size, path) for path, spec in tree.items(transformer.specs(cfg.model)))
    all_tokens, flops = sizes(cfg).tokens_before(cfg.run.steps), flops_per_token(cfg.model, r.sequence_length)
    return "\n".join(
        (
            f"parameters        {total:>20,}",
            *([f"  for a token     {active:>20,}  all but the experts that it is not sent to"] if active != total else []),
            f"  not embedding   {num_non_embedding_params(cfg.model):>20,}",
            f"  largest         {largest[0]:>20,}  {largest[1]}",
            *([f"  trained         {trained:>20,}"] if trained != total else []),
            f"tokens a step     {r.batch_size * r.sequence_length:>20,}  in {cfg.run.steps:,} steps: {all_tokens:,}",
            f"FLOPs a token     {flops:>20,.0f}  forward and backward, causal pairs only",
            f"FLOPs of the run  {run_flops(cfg):>20.3e}",
            f"memory of state   {gib(sum(parts.values())):>20}  "
            + ", ".join(f"{name} {gib(size)}" for name, size in parts.items())
            + " (above by rank, with activations)",
        )
    )


def run_flops(cfg: Config) -> float:
    """Forward and backward of all steps, each at its own sequence length."""
    found = sizes(cfg)
    ends = [min(phase.step, cfg.run.steps) for phase in found.phases] + [cfg.run.steps]
    tokens = [found.tokens_before(end) - found.tokens_before(start) for start, end in pairwise(ends)]
    each = [flops_per_token(cfg.model, phase.sequence_length) for phase in found.phases]
    return sum(n * flops for n, flops in zip(tokens, each, strict=True))


def gib(size: float) -> str:
    """Bytes in words.

    >>> gib(3 * 2**30)
    '3.00 GiB'
    """
    return f"{size / 2**30:.2f} GiB"


def comparison(result: Result) -> str:
    """The model's bits per byte beside those of gzip and xz on the same text; empty unless all of it was evaluated."""
    source, found = result.session.source, result.heldout
    if found is None or found.bits_per_byte is None or not source.heldout_compressed:
        return ""
    num_bytes = source.heldout[HELDOUT].num_bytes(source.tokenizer)
    if not num_bytes or found.tokens != len(source.heldout[HELDOUT]):
        return ""
    others = {name: 8 * size / num_bytes for name, size in source.heldout_compressed.items()}
    rows = [("this model", found.bits_per_byte), *others.items()]
    lines = "\n".join(f"  {name:<12} {bits:.3f}" for name, bits in rows)
    return f"bits per byte of the held-out text ({num_bytes:,} bytes):\n{lines}"


def next_commands(result: Result) -> str:
    """What a user may type after a run."""
    cfg, folder = result.session.cfg, result.session.folder
    where, config, other = (shlex.quote(str(path)) for path in (folder, folder / "config.yaml", f"{folder}-2"))
    test = f"loss over lr:  olmo-fn plot range-test {where}\n" if cfg.schedule.name == "range-test" else ""
    name = shlex.quote(f"{folder}-hf")
    export = f"hugging face:  olmo-fn convert to-hf {where} {name}\n" if cfg.init.from_hf else ""
    return test + (
        f"sample more:   olmo-fn generate {where} {shlex.quote(cfg.run.sample or 'def ')} --temperature 0.7\n"
        f"checkpoints:   olmo-fn checkpoint {where}\n{export}"
        f"train again:   python train.py {config} --optim.lr {cfg.optim.lr / 2:g} --run.folder {other}"
    )


def stopped(result: Result) -> str:
    """What to say when a signal or an observer ended a run."""
    if result.stopped_by == FAILURE:  # its line says it all
        return ""
    run, folder, by = result.session.cfg.run, result.session.folder, ":" if result.stopped_by == OBSERVER else " by"
    return (
        f"stopped{by} {result.reason} after step {result.step} of {run.steps}; the state is saved. To go on:\n"
        f"  python train.py {shlex.quote(str(folder / 'config.yaml'))}"
    )


def say(text: str) -> None:
    """Print a paragraph unless it is empty, or nobody reads it any more."""
    try:
        if text:
            print(text, flush=True)
    except OSError:
        mute()
