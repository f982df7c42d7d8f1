"""What a run says in words: the dry run, the end, and a picture of the loss."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from olmo_fn import tree
from olmo_fn.models import transformer
from olmo_fn.models.count import flops_per_token, num_non_embedding_params, num_params
from olmo_fn.train.config import Config
from olmo_fn.train.loop import FAILURE, OBSERVER, Result
from olmo_fn.train.observers import read_metrics
from olmo_fn.train.observers.console import mute
from olmo_fn.train.recipe import is_trained, parameters, recipe
from olmo_fn.train.schedule import sizes
from olmo_fn.train.serialize import to_yaml
from olmo_fn.train.session import abstract_state


def dry_run(cfg: Config) -> str:
    """The resolved config, parameters, FLOPs and memory of the state, without allocating anything."""
    step = recipe(cfg)  # a wrong one is refused here too
    r, total, specs = cfg.recipe, num_params(cfg.model), tree.flatten(parameters(cfg))
    trained = sum(spec.size for path, spec in specs.items() if is_trained(cfg, path))
    slots = abstract_state(step, parameters(cfg))["slots"]
    kept = {name: sum(x.nbytes for _, x in tree.items(slot)) for name, slot in slots.items()}
    parts = {"parameters": 4 * sum(spec.size for spec in specs.values()), "gradients": 4 * trained}
    parts |= {name: size for name, size in kept.items() if size > 1e6}
    largest = max((spec.size, path) for path, spec in tree.items(transformer.specs(cfg.model)))
    all_tokens, flops = sizes(cfg).tokens_before(cfg.run.steps), flops_per_token(cfg.model, r.sequence_length)
    return "\n".join(
        (
            to_yaml(cfg).rstrip(),
            "",
            f"parameters        {total:>20,}",
            f"  not embedding   {num_non_embedding_params(cfg.model):>20,}",
            f"  largest         {largest[0]:>20,}  {largest[1]}",
            *([f"  trained         {trained:>20,}"] if trained != total else []),
            f"tokens a step     {r.batch_size * r.sequence_length:>20,}  in {cfg.run.steps:,} steps: {all_tokens:,}",
            f"FLOPs a token     {flops:>20,.0f}  forward and backward, causal pairs only",
            f"FLOPs of the run  {run_flops(cfg):>20.3e}",
            f"memory of state   {gib(sum(parts.values())):>20}  "
            + ", ".join(f"{name} {gib(size)}" for name, size in parts.items())
            + "; by rank, with activations:",
            "",
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
    if found is None or found.bits_per_byte is None or found.tokens != len(source.heldout):
        return ""
    if not source.heldout_bytes or not source.heldout_compressed:
        return ""
    others = {name: 8 * size / source.heldout_bytes for name, size in source.heldout_compressed.items()}
    rows = [("this model", found.bits_per_byte), *others.items()]
    lines = "\n".join(f"  {name:<12} {bits:.3f}" for name, bits in rows)
    return f"bits per byte of the held-out text ({source.heldout_bytes:,} bytes):\n{lines}"


def next_commands(result: Result) -> str:
    """What a user may type after a run."""
    cfg, folder = result.session.cfg, result.session.folder
    test = f"loss over lr:  olmo-fn plot range-test {folder}\n" if cfg.schedule.name == "range-test" else ""
    return test + (
        f"sample more:   olmo-fn generate {folder} 'def ' --temperature 0.7\n"
        f"checkpoints:   olmo-fn checkpoint {folder}\n"
        f"train again:   python train.py {folder}/config.yaml --optim.lr {cfg.optim.lr / 2:g} --run.folder {folder}-2"
    )


def plot_loss(folder: Path) -> Path | None:
    """Draw ``loss.png`` from ``metrics.jsonl``; None without matplotlib (extra ``plot``) or without steps."""
    lines = read_metrics(folder / "metrics.jsonl", "tokens", "loss", "grad_norm", "lr", "skipped")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if not lines:
        return None
    tokens = [line["tokens"] / 1e6 for line in lines]
    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
    axes[0].plot(tokens, [line.get("ce", line["loss"]) for line in lines], linewidth=0.8, color="tab:blue")
    axes[0].set_ylabel("cross entropy (nats a token)")
    axes[0].set_title(folder.name)
    axes[1].plot(tokens, [line["grad_norm"] for line in lines], linewidth=0.8, color="tab:orange")
    axes[1].set_ylabel("gradient norm")
    axes[1].set_yscale("log")
    axes[2].plot(tokens, [line["lr"] for line in lines], linewidth=1.2, color="tab:green")
    axes[2].set_ylabel("learning rate")
    axes[2].set_xlabel("million tokens")
    for line in lines:
        if line["skipped"]:
            axes[0].axvline(line["tokens"] / 1e6, color="tab:red", linewidth=0.5)
    for one in axes:
        one.grid(alpha=0.3)
    path = folder / "loss.png"
    figure.savefig(path, dpi=120)
    return path


def stopped(result: Result) -> str:
    """What to say when a signal or an observer ended a run."""
    if result.stopped_by == FAILURE:  # its line says it all
        return ""
    run, by = result.session.cfg.run, ":" if result.stopped_by == OBSERVER else " by"
    return (
        f"stopped{by} {result.reason} after step {result.step} of {run.steps}; the state is saved. To go on:\n"
        f"  python train.py {run.folder}/config.yaml"
    )


def say(text: str) -> None:
    """Print a paragraph unless it is empty, or nobody reads it any more."""
    try:
        if text:
            print(text, flush=True)
    except OSError:
        mute()
