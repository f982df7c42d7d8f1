"""olmo_fn against OLMo-core 3.0.0, in turn, at equal sizes and threads; prints a JSON line a size.

    python benchmarks/compare.py --sizes A B C --rounds 3

OLMo-core runs in an environment of its own (made on first use, or given with ``--peer-python``) and at its best of the modes
asked for. Every round runs each program once, so that both see the same machine; the figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SIZES = {  # d_model, layers, heads, hidden, vocabulary, batch, length
    "A": (256, 4, 8, 768, 4096, 8, 512),
    "B": (512, 8, 8, 2048, 8192, 4, 512),
    "C": (512, 8, 8, 2048, 100_352, 2, 512),
}
FLAGS = ("--d-model", "--n-layers", "--n-heads", "--hidden-size", "--vocab-size", "--batch-size", "--sequence-length")


def peer_python(folder: Path) -> str:
    """The interpreter of an environment with ai2-olmo-core 3.0.0, made if it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        packages = ["torch>=2.13,<2.14", "ai2-olmo-core==3.0.0"]
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
    return str(python)


def run(command: list[str], cache: Path, timeout: float) -> dict | None:
    """The JSON line of one run; None if it took longer than ``timeout`` seconds."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    try:
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return None
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Compare at the sizes asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--timeout", type=float, default=600, help="seconds a run may take; slower modes drop out")
    parser.add_argument(
        "--peer-modes", nargs="+", default=["fp32 compile", "fp32 no-compile", "bf16 compile", "bf16 no-compile"]
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="that of olmo_fn")
    parser.add_argument("--peer-python", default="", help="interpreter with ai2-olmo-core 3.0.0")
    args = parser.parse_args()
    peer = args.peer_python or peer_python(HERE / ".olmo-core")
    for name in args.sizes:
        size = [word for flag, value in zip(FLAGS, SIZES[name], strict=True) for word in (flag, str(value))]
        size += ["--n-kv-heads", str(SIZES[name][2]), "--steps", str(args.steps), "--threads", str(args.threads)]
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = compare(args, peer, size, Path(folder))
        best = max(theirs, key=lambda mode: median(theirs[mode][1:], "tokens_per_s"))
        their = theirs[best]
        ratios = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(ours[1:], their[1:], strict=True)]
        line = {
            "size": name,
            "ratio": round(median(ours[1:], "tokens_per_s") / median(their[1:], "tokens_per_s"), 3),
            "ratio_per_round": [round(ratio, 3) for ratio in ratios],
            "memory_ratio": round(median(ours[1:], "peak_rss_mb") / median(their[1:], "peak_rss_mb"), 3),
            "tokens_per_s": median(ours[1:], "tokens_per_s"),
            "olmo_core_tokens_per_s": {mode: median(rows[1:], "tokens_per_s") for mode, rows in theirs.items()},
            "peak_rss_mb": [median(ours[1:], "peak_rss_mb"), median(their[1:], "peak_rss_mb")],
            "warmup_cold_s": [ours[0]["warmup_s"], their[0]["warmup_s"]],
            "warmup_warm_s": [median(ours[1:], "warmup_s"), median(their[1:], "warmup_s")],
            "mfu": median(ours[1:], "mfu"),
            "gemm_peak_gflops": median(ours[1:], "gemm_peak_gflops"),
            "rounds": args.rounds,
            "threads": args.threads,
        }
        print(json.dumps(line), flush=True)


def compare(args: argparse.Namespace, peer: str, size: list[str], folder: Path) -> tuple[list[dict], dict[str, list[dict]]]:
    """Rows of olmo_fn, and of OLMo-core by mode; the first of each is the cold one, and not counted."""
    ours: list[dict] = []
    theirs: dict[str, list[dict]] = {mode: [] for mode in args.peer_modes}
    for _ in range(args.rounds + 1):
        command = [sys.executable, str(HERE / "train_step.py"), *size, "--dtype", args.dtype, "--cache", str(folder / "ours")]
        row = run(command, folder / "ours", args.timeout)
        if row is None:
            raise SystemExit(f"olmo_fn took longer than {args.timeout} s; raise --timeout")
        ours.append(row)
        for mode in list(theirs):
            dtype, compiled = mode.split()
            command = [peer, str(HERE / "olmo_core_step.py"), *size, "--dtype", dtype, f"--{compiled}"]
            row = run(command, folder / mode.replace(" ", "-"), args.timeout)
            if row is None:
                print(f"OLMo-core, {mode}: longer than {args.timeout} s, left out", file=sys.stderr)
                del theirs[mode]
            else:
                theirs[mode].append(row)
    return ours, theirs


def median(rows: list[dict], key: str) -> float:
    """The median of a figure."""
    return statistics.median(row[key] for row in rows)


if __name__ == "__main__":
    main()
