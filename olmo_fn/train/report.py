"""What a run says in words: the dry run, the end, and a picture of the loss."""

from __future__ import annotations

import signal
from pathlib import Path

from torch.distributed.tensor import DTensor

from olmo_fn import tree
from olmo_fn.checkpoint import load, step_path
from olmo_fn.core.step import State
from olmo_fn.data.source import Source
from olmo_fn.generate.config import Sampling
from olmo_fn.generate.text import LanguageModel, generate_text
from olmo_fn.models import transformer
from olmo_fn.models.count import flops_per_token, num_non_embedding_params, num_params
from olmo_fn.planner import tables as plan
from olmo_fn.train.config import Config
from olmo_fn.train.evals import Heldout
from olmo_fn.train.loop import abstract_state
from olmo_fn.train.metrics import read_metrics
from olmo_fn.train.recipe import is_trained, model_parameters, parameters, recipe
from olmo_fn.train.schedule import sizes
from olmo_fn.train.serialize import to_yaml


def dry_run(cfg: Config) -> str:
    """The resolved config, parameters, FLOPs, and the plan by rank (`olmo_fn.planner`), without allocating anything."""
    recipe(cfg)  # a wrong one is refused here too
    r, total = cfg.recipe, num_params(cfg.model)
    tokens, all_tokens = r.batch_size * r.sequence_length, sizes(cfg).tokens_before(cfg.run.steps)
    flops = flops_per_token(cfg.model, r.sequence_length)
    own = tree.flatten(parameters(cfg))
    trained = sum(spec.size for path, spec in own.items() if is_trained(cfg, path))
    slots = abstract_state(cfg, recipe(cfg))["slots"]
    kept = {name: sum(x.nbytes for _, x in tree.items(slot)) for name, slot in slots.items()}
    parts = {"parameters": 4 * sum(spec.size for spec in own.values()), "gradients": 4 * trained}
    parts |= {name: size for name, size in kept.items() if size > 1e6}
    shapes = transformer.specs(cfg.model)
    largest = max((spec.size, path) for path, spec in tree.items(shapes))
    return "\n".join(
        (
            to_yaml(cfg).rstrip(),
            "",
            f"parameters        {total:>20,}",
            f"  not embedding   {num_non_embedding_params(cfg.model):>20,}",
            f"  largest         {largest[0]:>20,}  {largest[1]}",
            *([f"  trained         {trained:>20,}"] if trained != total else []),
            f"tokens a step     {tokens:>20,}  in {cfg.run.steps:,} steps: {all_tokens:,}",
            f"FLOPs a token     {flops:>20,.0f}  forward and backward, causal pairs only",
            f"FLOPs of the run  {flops * all_tokens:>20.3e}",
            f"memory of state   {gib(sum(parts.values())):>20}  "
            + ", ".join(f"{name} {gib(size)}" for name, size in parts.items())
            + "; by rank, with activations:",
            "",
            plan.report(cfg),
        )
    )


def gib(size: float) -> str:
    """Bytes in words.

    >>> gib(3 * 2**30)
    '3.00 GiB'
    """
    return f"{size / 2**30:.2f} GiB"


def comparison(source: Source, found: Heldout | None) -> str:
    """The model's bits per byte beside those of gzip and xz on the same text; empty unless all of it was evaluated."""
    if found is None or found.bits_per_byte is None or found.tokens != len(source.heldout):
        return ""
    if not source.heldout_bytes or not source.heldout_compressed:
        return ""
    others = {name: 8 * size / source.heldout_bytes for name, size in source.heldout_compressed.items()}
    rows = [("this model", found.bits_per_byte), *others.items()]
    lines = "\n".join(f"  {name:<12} {bits:.3f}" for name, bits in rows)
    return f"bits per byte of the held-out text ({source.heldout_bytes:,} bytes):\n{lines}"


def next_commands(cfg: Config, folder: Path) -> str:
    """What a user may type after a run."""
    test = f"loss over lr:  olmo-fn plot range-test {folder}\n" if cfg.schedule.name == "range-test" else ""
    return test + (
        f"sample more:   olmo-fn generate {folder} 'def ' --temperature 0.7\n"
        f"checkpoints:   olmo-fn checkpoint {folder}\n"
        f"train again:   python train.py {folder}/config.yaml --optim.lr {cfg.optim.lr / 2:g} --run.folder {folder}-2"
    )


def plot_loss(folder: Path) -> Path | None:
    """Draw ``loss.png`` from ``metrics.jsonl``; None without matplotlib (extra ``plot``) or without steps."""
    lines = read_metrics(folder / "metrics.jsonl")
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


def sample(cfg: Config, state: State, source: Source, tokens: int = 160) -> str:
    """A sample of text that goes on from ``run.sample``; empty without a tokenizer or a prompt."""
    if not cfg.run.sample or source.tokenizer is None:
        return ""
    params = state.params
    if any(isinstance(p, DTensor) for _, p in tree.items(params)):  # the checkpoint of the last step has them whole
        path = step_path(Path(cfg.run.folder) / "checkpoints", int(state.step))
        params = load(path, select=["params.*"])[0]["params"]
    model = LanguageModel(cfg.model, model_parameters(cfg, params), source.tokenizer, cfg.recipe.sequence_length)
    text = generate_text(model, cfg.run.sample, Sampling(max_tokens=tokens))
    return f"sample:\n{cfg.run.sample}{text}\n"


def stopped(signal_number: int, cfg: Config, step: int) -> str:
    """What to say when a signal ended a run."""
    name = signal.Signals(signal_number).name
    return (
        f"stopped by {name} after step {step} of {cfg.run.steps}; the state is saved. To go on:\n"
        f"  python train.py {cfg.run.folder}/config.yaml"
    )


def say(text: str) -> None:
    """Print a paragraph unless it is empty."""
    if text:
        print(text, flush=True)
