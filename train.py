"""Train a model: ``python train.py olmo2-tiny``, ``python train.py olmo2-1b --optim.lr 6e-3``.

The first word is a preset of ``configs.py``, or the ``config.yaml`` (or the folder) of an earlier run. Every flag is a field
of `olmo_fn.train.config.Config`: ``python train.py olmo2-tiny --help`` lists them.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import tyro

from configs import CONFIGS
from olmo_fn.launch.exit_rank import exit_rank
from olmo_fn.train.config import Config
from olmo_fn.train.environment import prepare_environment


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit code: 2 for wrong input, 128 + n when signal n ended the run."""
    try:
        return run(parse(arguments))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parse(arguments: list[str]) -> Config:
    """The config that the arguments describe."""
    first = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if first and (first.endswith((".yaml", ".yml")) or "/" in first or Path(first, "config.yaml").exists()):
        from olmo_fn.train.folder import read_config

        return tyro.cli(Config, args=arguments[1:], default=read_config(Path(first)), prog=f"train.py {first}")
    presets = {name: (describe(config), config) for name, config in CONFIGS.items()}
    config = tyro.extras.overridable_config_cli(presets, args=arguments)
    return config if config.run.folder else replace(config, run=replace(config.run, folder=f"runs/{first}"))


def describe(config: Config) -> str:
    """A preset in one line."""
    m = config.model
    return f"d_model {m.d_model}, {m.n_layers} layers, vocabulary {m.vocab_size:,}"


def run(cfg: Config) -> int:
    """Train, evaluate, sample, and say what to type next."""
    from olmo_fn.checkpoint import SaveFailed
    from olmo_fn.generate.load import sample_run
    from olmo_fn.planner import tables
    from olmo_fn.planner.fit import check_memory
    from olmo_fn.train import machine, report

    cfg.check()
    if cfg.dry_run:
        report.say(f"{report.dry_run(cfg)}\n{tables.report(cfg)}")
        return 0
    if cfg.nproc and "RANK" not in os.environ:
        from olmo_fn.launch.local import launch

        cfg.check_processes(cfg.nproc)  # refused here, once
        return launch(sys.argv, cfg.nproc, Path(cfg.run.folder))
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


if __name__ == "__main__":
    prepare_environment()
    with exit_rank():
        sys.exit(main(sys.argv[1:]))
