"""Runs that are killed at a file operation or a moment, in forks of this process, which has imported all: 50 ms a start."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from programs import context

from olmo_fn import tree
from olmo_fn.checkpoint import load, newest_whole
from olmo_fn.data.settings import Data
from olmo_fn.data.tokenizer import byte_level
from olmo_fn.models.config import dense
from olmo_fn.train import machine
from olmo_fn.train.config import Config, Growth, Lora, Recipe, Run
from olmo_fn.train.loop import train
from olmo_fn.train.observers import read_metrics
from olmo_fn.train.optimizers import AdamW, Muon
from olmo_fn.train.schedules import Cosine

TIMES = {"seconds", "tokens_per_s", "mfu", "peak_mb", "gemm_flops_per_s"}
CALLS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "fdatasync", "pwrite", "ftruncate", "truncate", "symlink")
"""The functions of `os` that change what is on the disk; opening for writing is heard of by an audit hook."""


def kinds(folder: Path) -> dict[str, Config]:
    """Small runs, one of each kind that keeps something else from step to step; their data is made in ``folder``."""
    np.random.default_rng(0).integers(1, 250, 4000).astype("<u2").tofile(folder / "tokens.npy")
    byte_level().save(folder / "tokenizer.json")
    plain = Config(
        model=dense(8, 1, 2, 12, vocab_size=257),
        data=Data((str(folder / "tokens.npy"),), tokenizer=str(folder / "tokenizer.json"), dtype="uint16"),
        optim=AdamW(lr=1e-2),
        schedule=Cosine(warmup=2),
        recipe=Recipe(4, 16, compile=False, dtype="float32"),
        run=Run(
            str(folder / "run"), steps=9, checkpoint_every=2, keep_last=2, eval_every=4, threads=1, sample="", device="cpu"
        ),
    )
    first = replace(plain, run=replace(plain.run, folder=str(folder / "first"), steps=3))
    recipe = plain.recipe
    return {
        "plain": plain,
        "accumulate": replace(plain, recipe=replace(recipe, accumulate=2, noise_scale=0.9)),
        "growth": replace(plain, growth=Growth((2,), (3,), min_length=8, length_steps=6, length_multiple=4)),
        "ema": replace(plain, recipe=replace(recipe, ema=0.9, merge_last=2, merge_every=4)),
        "muon": replace(plain, optim=Muon(lr=1e-2)),
        "lora": replace(plain, lora=Lora(rank=2), run=replace(plain.run, start_from=first.run.folder)),
        "start-from": replace(plain, run=replace(plain.run, start_from=first.run.folder)),
        "first": first,
    }


def fork(work: Callable[[], object], after: float | None = None) -> int:
    """Do ``work`` in a fork, killed ``after`` so many seconds; its exit code, minus the signal's number if one ended it."""
    if (pid := os.fork()) == 0:
        code = 70
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            machine.gemm_rate = lambda *args: 1e12  # it takes a third of a second, and changes nothing
            if after is not None:
                timer = threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL))
                timer.daemon = True
                timer.start()
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at(n: float, note: Callable[[], object] = lambda: None) -> None:
    """From here on, end this process by SIGKILL before its ``n``-th operation that changes files; ``note`` hears of each."""
    lock, count = threading.Lock(), [0]

    def operation() -> None:
        with lock:
            count[0] += 1
            note()
            if count[0] >= n:
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(10)

    def counted(call: Callable) -> Callable:
        return lambda *args, **options: (operation(), call(*args, **options))[1]

    def heard(event: str, args: tuple) -> None:
        if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR) and args[0] != os.devnull:
            operation()

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    sys.addaudithook(heard)


def operations(cfg: Config, log: Path) -> int:
    """How many operations an undisturbed run makes."""
    fd = os.open(log, os.O_CREAT | os.O_WRONLY)
    assert fork(lambda: (kill_at(float("inf"), lambda: os.write(fd, b".")), train(cfg))) == 0
    os.close(fd)
    return log.stat().st_size


def outcome(cfg: Config) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """All that a run computed: the state at its end, and its metrics but for times."""
    folder = Path(cfg.run.folder)
    path = newest_whole(folder / "checkpoints")
    assert path is not None
    assert path.name == f"step{cfg.run.steps}"
    lines = [{name: x for name, x in line.items() if name not in TIMES} for line in read_metrics(folder / "metrics.jsonl")]
    return tree.flatten(load(path)[0]), lines


def differences(cfg: Config, expected: tuple[dict[str, torch.Tensor], list[dict]]) -> list[str]:
    """What of a run's outcome is not, bit for bit, as expected."""
    (state, lines), (wanted, wanted_lines) = outcome(cfg), expected
    wrong = [path for path in state.keys() | wanted.keys() if path not in state or not torch.equal(state[path], wanted[path])]
    return wrong + (["metrics.jsonl"] if lines != wanted_lines else [])


def trial(cfg: Config, total: int, seconds: float, chance: random.Random, kills: int) -> list[tuple[str, int]]:
    """Start a run ``kills`` times, each time to be killed, at an operation or a moment by turns, then once more to its end.

    What each start was to meet, and its exit code.
    """
    starts = []
    for i in range(kills):
        if i % 3 == 2:
            moment = chance.random() * seconds
            starts.append((f"after {moment:.3f} s", fork(partial(train, cfg), after=moment)))
        else:
            n = chance.randint(1, total if i % 3 else max(2, total // 6))  # more at the start, where the folder is made
            starts.append((f"at operation {n}", fork(lambda n=n: (kill_at(n), train(cfg)))))
    return [*starts, ("never", fork(partial(train, cfg)))]


def kill_and_go_on(folder: Path, kind: str, kills: int, seed: int = 0) -> int:
    """Kill runs of a kind, each up to three times, until there were so many kills; how many there were.

    AssertionError, with what was done to the run, if it does not go on, or ends with other bits.
    """
    cfgs = kinds(folder)
    cfg, chance, done = cfgs[kind], random.Random(f"{kind} {seed}"), 0
    assert fork(partial(train, cfgs["first"])) == 0
    whole = replace(cfg, run=replace(cfg.run, folder=str(folder / "whole")))
    begun = time.monotonic()
    total, seconds = operations(whole, folder / "log"), time.monotonic() - begun
    expected = outcome(whole)
    while done < kills:
        shutil.rmtree(cfg.run.folder, ignore_errors=True)
        starts = trial(cfg, total, seconds, chance, min(3, kills - done))
        assert starts[-1][1] == 0, starts
        assert all(code in (0, -signal.SIGKILL) for _, code in starts), starts
        assert (wrong := differences(cfg, expected)) == [], (wrong, starts)
        assert not list(Path(cfg.run.folder).rglob(".partial-*")), starts
        done += sum(code != 0 for _, code in starts)
    return done


def in_clean_process(work: Callable[..., int], *args: object) -> int:
    """The result of ``work`` in a process that has imported all and used nothing, from which it is safe to fork."""
    mine, its = context.Pipe()
    process = context.Process(target=_answer, args=(its, work, args))
    process.start()
    its.close()
    answer = mine.recv()
    process.join()
    if isinstance(answer, str):
        raise AssertionError(answer)
    return answer


def _answer(pipe, work: Callable[..., int], args: tuple) -> None:
    torch.set_num_threads(1)
    try:
        pipe.send(work(*args))
    except BaseException:
        pipe.send(traceback.format_exc())
