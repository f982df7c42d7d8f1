"""The training step beside a busy neighbour: olmo_fn and OLMo-core, quiet and with one other process using one core, in turn.

    python benchmarks/neighbour.py --rounds 3

Prints a JSON line: tokens/s of both programs, both ways (medians over the rounds), what is left of the quiet speed, and the
ratio of the busy ones. OLMo-core runs in an environment of its own, as in ``compare.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compare import FLAGS, HERE, SIZES, median, peer_python, run


@contextmanager
def neighbour(busy: bool) -> Iterator[None]:
    """One other process that uses one core all the time, inside the block."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        yield
    finally:
        if other:
            other.kill()
            other.wait()


def main() -> None:
    """Measure in turn and print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="A")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--timeout", type=float, default=600)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--peer-python", default="", help="interpreter with ai2-olmo-core 3.0.0; 'none' leaves it out")
    args = parser.parse_args()
    size = [word for flag, value in zip(FLAGS, SIZES[args.size], strict=True) for word in (flag, str(value))]
    size += ["--steps", str(args.steps), "--threads", str(args.threads), "--dtype", args.dtype]
    programs = {"olmo_fn": [sys.executable, str(HERE / "train_step.py"), *size]}
    if args.peer_python != "none":
        peer = args.peer_python or peer_python(HERE / ".olmo-core")
        kv = ["--n-kv-heads", str(SIZES[args.size][2])]
        programs["olmo_core"] = [peer, str(HERE / "olmo_core_step.py"), *size, *kv]
    rows: dict[tuple[str, bool], list[dict]] = {(name, busy): [] for name in programs for busy in (False, True)}
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: Path(folder, name) for name in programs}
        own = {"olmo_fn": ["--cache", str(caches["olmo_fn"])]}
        for number in range(args.rounds + 1):
            for name, busy in list(rows) if number else [(name, False) for name in programs]:  # the first one compiles
                with neighbour(busy):
                    row = run([*programs[name], *own.get(name, [])], caches[name], args.timeout)
                if row is None:
                    raise SystemExit(f"{name} took longer than {args.timeout} s; raise --timeout")
                if number:
                    rows[name, busy].append(row)
    speed = {key: median(found, "tokens_per_s") for key, found in rows.items()}
    line: dict[str, object] = {"size": args.size, "dtype": args.dtype, "threads": args.threads, "rounds": args.rounds}
    for name in programs:
        quiet, busy_speed = speed[name, False], speed[name, True]
        line[name] = {"quiet": quiet, "busy": busy_speed, "left": round(busy_speed / quiet, 3)}
        line[name]["rounds_busy"] = [row["tokens_per_s"] for row in rows[name, True]]  # type: ignore[index]
    if "olmo_core" in programs:
        line["ratio_busy"] = round(speed["olmo_fn", True] / speed["olmo_core", True], 3)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
