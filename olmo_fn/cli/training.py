"""``olmo-fn train olmo2-tiny``, ``olmo-fn train olmo2-1b --optim.lr 6e-3``; ``python train.py`` is the same. Imports no torch.

The first word is a preset, or the ``config.yaml`` (or the folder) of an earlier run; or there is none, and
``--init.from-hf DIR`` gives the model. Every flag is a field of
`olmo_fn.train.config.Config`: ``olmo-fn train olmo2-tiny --help`` lists them, and ``--optim.name muon --help`` those of Muon.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import field, fields, is_dataclass, make_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from olmo_fn.cli import parsing
from olmo_fn.fields import get, values
from olmo_fn.launch.place import place_from_env
from olmo_fn.models.config import Attention, GatedDelta, Model
from olmo_fn.models.settings.feed_forward import GELU, Gated
from olmo_fn.models.settings.moe import MoE
from olmo_fn.train.choices import Choices, choosable, choose, classes_of, describe, locate, with_files
from olmo_fn.train.config import CHOICES, Config
from olmo_fn.train.finetune import check_model, data_of, described, finetuning
from olmo_fn.train.folder import read_config

SHAPE = {"d_model", "n_layers", "vocab_size", "tie_embeddings", "n_heads", "n_kv_heads", "head_dim", "hidden_size"}
"""Fields of a model, and of its parts, without which parameters do not fit."""


def main(words: Sequence[str], presets: Mapping[str, Config], prog: str, again: Sequence[str]) -> int:
    """Train as the words say; the exit code, 128 + n when signal n ended the run. ``python *again *words`` is this program."""
    config = parse(words, presets, prog)
    return 0 if config is None else run(config, [*again, *words])


def parse(words: Sequence[str], presets: Mapping[str, Config], prog: str) -> Config | None:
    """The config that the words describe; None when they ask for help, which is printed."""
    use, rest = take(words, "--use")
    files = locate(use)
    choices, more = with_files(CHOICES, files)
    presets = {**presets, **more}
    if not rest or rest[0] in ("-h", "--help"):
        print(overview(presets, prog))
        return None
    first, *flags = rest
    directories = take(rest, "--init.from-hf")[0] or take(rest, "--init.from_hf")[0]
    if first.startswith("-") and directories:
        first, flags = directories[-1], rest
        config = finetuning(Path(first).expanduser())
    elif first in presets:
        config = presets[first]
    elif Path(first, "config.json").is_file() and not Path(first, "config.yaml").exists():
        raise ValueError(f"{first} is a Hugging Face directory; to train from it: {prog} --init.from-hf {shlex.quote(first)}")
    elif first.startswith("-"):
        name = next((word for word in flags if word in presets), next(iter(presets)))
        raise ValueError(f"the preset comes first: {prog} {shlex.join([name, *(word for word in rest if word != name)])}")
    elif first.endswith((".yaml", ".yml")) or "/" in first or Path(first, "config.yaml").exists():
        config = read_config(Path(first))
        choices, _ = with_files(choices, config.use)
    else:
        hint = parsing.did_you_mean(first, presets)
        raise ValueError(f"{first!r} is no preset, and no run's config.yaml or folder{hint} {prog} --help lists the presets")
    model = config.model
    config, flags = choose(replace(config, use=tuple(dict.fromkeys((*config.use, *files)))), flags, choices)
    cls, default = group(config, flags)
    words = describe(config, choices)
    config = parsing.parse(cls, f"{prog} {first}", flags, elsewhere(config, choices), default=default, description=words)
    check_pattern(model, config.model)
    config = with_tokenizer(one_of_both(config, flags))
    name = first if first in presets else Path(first).stem
    return config if config.run.folder else replace(config, run=replace(config.run, folder=f"runs/{name}"))


def check_pattern(before: Model, after: Model) -> None:
    """ValueError, with the first of them, if flags have changed the block of a model whose layers are a pattern of others."""
    if after.pattern and after.block != before.block:
        old, new = ({field.flag: field.value for field in values(replace(m, pattern=()))} for m in (before, after))
        flag = next(flag for flag, value in new.items() if old.get(flag) != value).replace("--", "--model.", 1)
        raise ValueError(
            f"{flag}: the layers of this model repeat a pattern of {len(after.pattern)} blocks, which no flag changes; edit "
            "model.pattern in a copy of a run's config.yaml, or write a preset in configs.py"
        )


def with_tokenizer(config: Config) -> Config:
    """The config with the tokenizer of the directory that the weights come from, unless another is named."""
    if not config.init.from_hf or config.data.tokenizer:
        return config
    found = data_of(Path(config.init.from_hf))
    return replace(config, data=replace(config.data, tokenizer=found.tokenizer, eos=config.data.eos or found.eos))


def group(config: Config, flags: list[str]) -> tuple[Any, Any]:
    """The class, and the values, of the settings that the flags are about: all, or one group after ``--help optim``."""
    asked = next((i for i, flag in enumerate(flags) if flag in ("-h", "--help")), len(flags)) + 1
    if asked >= len(flags) or flags[asked].startswith("-"):
        return Config, config
    name, groups = flags[asked].replace("-", "_"), [f.name for f in fields(config) if is_dataclass(getattr(config, f.name))]
    if name not in groups:
        hint = parsing.did_you_mean(name, groups)
        raise ValueError(f"--help {flags[asked]}: there is no such group of flags{hint} There are {', '.join(groups)}")
    value, hint = getattr(config, name), get_type_hints(Config, include_extras=True)[name]
    cls = make_dataclass(name, [(name, hint, field(default=value))], frozen=True)
    return cls, cls()


def elsewhere(config: Config, choices: Choices) -> dict[str, str]:
    """For each flag of a class that might be chosen, and is not, what to choose."""
    return {
        f"{flag.removesuffix('name')}{field.name.replace('_', '-')}": f"{name} has it, choose that with {flag} {name}"
        for flag, path in choosable(config, choices).items()
        for name, cls in reversed([*classes_of(get(config, path), choices).items()])
        for field in fields(cls)
    }


def one_of_both(config: Config, flags: Sequence[str]) -> Config:
    """The config in which micro-batch, or else accumulate, says how much is computed at once: the one that was typed."""
    typed = {flag.partition("=")[0].replace("_", "-") for flag in flags}
    if "--recipe.accumulate" not in typed:
        return replace(config, recipe=replace(config.recipe, accumulate=1)) if config.recipe.micro_batch else config
    return config if "--recipe.micro-batch" in typed else replace(config, recipe=replace(config.recipe, micro_batch=0))


def take(words: Sequence[str], flag: str) -> tuple[list[str], list[str]]:
    """The values of a flag that may be given several times, and the other words.

    >>> take(["--use", "a.py", "olmo2-1b", "--use=b.py"], "--use")
    (['a.py', 'b.py'], ['olmo2-1b'])
    """
    values, rest, left = [], [], list(words)
    while left:
        word = left.pop(0)
        if word.startswith(f"{flag}="):
            values.append(word.removeprefix(f"{flag}="))
        elif word != flag:
            rest.append(word)
        elif left:
            values.append(left.pop(0))
        else:
            raise ValueError(f"{flag} needs a value after it")
    return values, rest


def overview(presets: Mapping[str, Config], prog: str) -> str:
    """The presets, in words."""
    rows = [("preset", "parameters", "width, depth", "vocab", "batch x length", "lr")]
    for name, config in presets.items():
        m, r = config.model, config.recipe
        shape, batch = f"{m.d_model:,} x {m.n_layers}", f"{r.batch_size:,} x {r.sequence_length:,}"
        rows.append((name, parameters(m), shape, f"{m.vocab_size:,}", batch, f"{config.optim.lr:g}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  " + "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    usage = f"usage: {prog} PRESET|RUN|config.yaml [--use FILE] [FLAGS]"
    first = next(iter(presets))
    more = [f"{prog} {first} --help lists the flags,", f"{prog} {first} --help optim those of one group."]
    return "\n".join([usage, "", *lines, "", *more])


def parameters(model: Model) -> str:
    """The number of parameters in three digits; nothing where the blocks are of somebody's own."""
    entries = (1 if model.tie_embeddings else 2) * model.vocab_size * model.d_model
    for layer, block in enumerate(model.layers):
        a, hidden = block.mixer, [rows(one) for one in (block.feed_forward.at(layer), getattr(block, "dense", None))]
        if type(a) not in (Attention, GatedDelta) or None in hidden:
            return ""
        width = a.width(model.d_model)
        if isinstance(a, GatedDelta):
            mixer = 2 * width * a.n_heads + (3 * a.value_width(model.d_model) + 2) * a.value_heads
        else:
            mixer = 2 * width * (a.n_heads + a.kv_heads) + (width * a.n_heads if a.gate == "element" else 0)
        entries += model.d_model * (mixer + sum(filter(None, hidden)))
    exponent = 9 if entries >= 999.5e6 else 6
    return f"{entries / 10**exponent:.3g} {'B' if exponent == 9 else 'M'}"


def rows(network: object) -> int | None:
    """The rows, as wide as the stream, of the matrices of a feed-forward network; None of one of somebody's own."""
    if network is None:
        return 0
    if isinstance(network, MoE):
        inner = network.num_experts * network.expert_size
        return network.num_experts + 3 * (inner + network.shared_size)
    return (3 if isinstance(network, Gated) else 2) * network.hidden_size if isinstance(network, Gated | GELU) else None


def check_start(cfg: Config) -> None:
    """ValueError, with the flags to take, if the run that this one starts from has a model of another shape."""
    start = Path(cfg.run.start_from)
    folder = next((path for path in (start, start.parent.parent) if (path / "config.yaml").is_file()), None)
    if not cfg.run.start_from or folder is None:
        return
    old_cfg = read_config(folder)
    if cfg.model.num_experts and not old_cfg.model.num_experts:
        raise ValueError(
            f"--run.start-from {str(start)!r} has no experts, and this model has; make some of its feed-forward networks with "
            f"olmo-fn convert upcycle {shlex.quote(str(start))} RUN, and start from that"
        )
    there, differ = {one.path: one.value for one in values(old_cfg)}, []
    for one in values(cfg):
        old = there.get(one.path, one.value)
        if one.path[0] == "model" and one.path[-1] in SHAPE and old != one.value:
            off = one.flag.replace("--model.", "--model.no-")
            differ.append((one.flag if old else off) if isinstance(old, bool) else f"{one.flag} {old}")
    if differ:
        raise ValueError(f"--run.start-from {str(start)!r} has a model of another shape; add {' '.join(differ)}")


def run(cfg: Config, command: Sequence[str]) -> int:
    """Train, evaluate, sample, and say what to type next."""
    cfg.check()
    check_start(cfg)
    if cfg.init.from_hf and not Path(cfg.run.folder, "config.yaml").exists():
        check_model(cfg)
    place = None if cfg.dry_run else place_from_env()
    if cfg.lora.rank and not cfg.run.start_from and not cfg.init.from_hf and (place is None or place.rank == 0):
        print(
            "warning: --lora.rank trains adapters of random weights here; give --run.start-from RUN or --init.from-hf DIR",
            file=sys.stderr,
        )
    if cfg.nproc and not cfg.dry_run and not (place and place.status):
        from olmo_fn.launch.local import launch

        if place:
            raise ValueError("RANK is set, by torchrun or an earlier job, and --nproc starts ranks of its own; leave out one")
        cfg.on(cfg.nproc).check_processes(cfg.nproc)  # refused here, once
        return launch(command, cfg.nproc, Path(cfg.run.folder))
    from olmo_fn.generate.load import sample_run
    from olmo_fn.planner import tables
    from olmo_fn.planner.fit import check_memory, with_weights
    from olmo_fn.plot import plot_loss
    from olmo_fn.train import machine, report

    if cfg.dry_run:
        report.say(tables.report(cfg))
        return 0
    from olmo_fn.plot_loads import plot_loads
    from olmo_fn.train.loop import train
    from olmo_fn.train.process import join
    from olmo_fn.train.session import open_run

    with join(cfg) as context:
        size = context.process.size
        report.say(described(cfg) if cfg.init.from_hf and context.is_main else "")
        session = open_run(cfg.on(size), context)
        dtype = str(session.dtype).removeprefix("torch.")
        memory = machine.total_memory(context.device, place.local_size if place else 1)
        if cfg.mesh.weights == "auto":  # as the rank with the least memory says
            least = -context.all_reduce_max(-int(memory))
            session = replace(session, cfg=with_weights(session.cfg, cfg.mesh.on(size), dtype, least, context.device.type))
        check_memory(session.cfg, cfg.mesh.on(size), dtype, memory, context.device.type)
        result = train(session)
    if context.is_main:
        if result.stopped_by:
            report.say(report.stopped(result))
        else:
            report.say(report.comparison(result))
            report.say(sample_run(session.folder, cfg.run.sample))
            picture = plot_loss(session.folder)
            report.say(f"loss curve:    {picture}" if picture else "")
            loads = plot_loads(session.folder)
            report.say(f"experts:       {loads}" if loads else "")
            report.say(report.next_commands(result))
    return result.exit_code
