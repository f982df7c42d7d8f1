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
    from olmo_fn.train import report

    cfg.check()
    if cfg.dry_run:
        report.say(report.dry_run(cfg))
        return 0
    if cfg.nproc and "RANK" not in os.environ:
        from olmo_fn.launch.local import launch

        cfg.check_processes(cfg.nproc)  # refused here, once
        return launch(sys.argv, cfg.nproc, Path(cfg.run.folder))
    from olmo_fn.train.loop import train

    try:
        result = train(cfg)
    except SaveFailed as error:
        raise ValueError(str(error)) from error
    if not result.leads:
        return 128 + result.stopped_by if result.stopped_by else 0
    if result.stopped_by:
        report.say(report.stopped(result.stopped_by, cfg, int(result.state.step)))
        return 128 + result.stopped_by
    report.say(report.comparison(result.source, result.heldout))
    report.say(report.sample(cfg, result.state, result.source))
    picture = report.plot_loss(result.folder)
    report.say(f"loss curve:    {picture}" if picture else "")
    report.say(report.next_commands(cfg, result.folder))
    return 0


if __name__ == "__main__":
    prepare_environment()
    with exit_rank():
        sys.exit(main(sys.argv[1:]))
