"""``olmo-fn train olmo2-tiny``, ``olmo-fn train olmo2-1b --optim.lr 6e-3``; ``python train.py`` is the same. Imports no torch.

The first word is a preset, or the ``config.yaml`` (or the folder) of an earlier run. Every flag is a field of
`olmo_fn.train.config.Config`: ``olmo-fn train olmo2-tiny --help`` lists them, and ``--optim.name muon --help`` those of Muon.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

import tyro

from olmo_fn.train.choices import choose, describe, locate, with_files
from olmo_fn.train.config import CHOICES, Config
from olmo_fn.train.folder import expanded, read_config


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
    if first in presets:
        config = presets[first]
    elif first.endswith((".yaml", ".yml")) or "/" in first or Path(first, "config.yaml").exists():
        config = read_config(Path(first))
        choices, _ = with_files(choices, config.use)
    else:
        close = get_close_matches(first, presets, 1)
        hint = f", did you mean {close[0]}?" if close else ";"
        raise ValueError(f"{first!r} is no preset, and no run's config.yaml or folder{hint} There are {', '.join(presets)}")
    config, flags = choose(replace(config, use=tuple(dict.fromkeys((*config.use, *files)))), flags, choices)
    config = tyro.cli(Config, args=flags, default=config, prog=f"{prog} {first}", description=describe(config, choices))
    name = first if first in presets else Path(first).stem
    config = config if config.run.folder else replace(config, run=replace(config.run, folder=f"runs/{name}"))
    return expanded(config)


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
    rows = []
    for name, config in presets.items():
        m = config.model
        rows.append(f"  {name:<14} d_model {m.d_model}, {m.n_layers} layers, vocabulary {m.vocab_size:,}")
    usage = f"usage: {prog} PRESET|RUN|config.yaml [--use FILE] [FLAGS]\n\nPresets:"
    return "\n".join([usage, *rows, "", f"{prog} {next(iter(presets))} --help lists the flags."])


def run(cfg: Config, command: Sequence[str]) -> int:
    """Train, evaluate, sample, and say what to type next."""
    cfg.check()
    if cfg.nproc and "RANK" not in os.environ and not cfg.dry_run:
        from olmo_fn.launch.local import launch

        cfg.check_processes(cfg.nproc)  # refused here, once
        return launch(command, cfg.nproc, Path(cfg.run.folder))
    from olmo_fn.checkpoint import SaveFailed
    from olmo_fn.generate.load import sample_run
    from olmo_fn.planner import tables
    from olmo_fn.planner.fit import check_memory
    from olmo_fn.train import machine, report

    if cfg.dry_run:
        report.say(f"{report.dry_run(cfg)}\n{tables.report(cfg)}")
        return 0
    from olmo_fn.train.loop import train
    from olmo_fn.train.process import join
    from olmo_fn.train.session import open_run

    try:
        with join(cfg) as context:
            session, size = open_run(cfg, context), context.process.size
            dtype = str(session.dtype).removeprefix("torch.")
            check_memory(cfg, cfg.mesh.on(size), dtype, machine.total_memory(context.device))
            result = train(session)
    except SaveFailed as error:
        raise ValueError(str(error)) from error
    if context.is_main:
        if result.stopped_by:
            report.say(report.stopped(result))
        else:
            report.say(report.comparison(result))
            report.say(sample_run(session.folder, cfg.run.sample))
            picture = report.plot_loss(session.folder)
            report.say(f"loss curve:    {picture}" if picture else "")
            report.say(report.next_commands(result))
    return result.exit_code
