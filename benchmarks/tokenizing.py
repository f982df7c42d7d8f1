"""Tokenizing beside the batch encoding of ``tokenizers`` on all cores, in turn; and the memory that a large corpus takes.

    python benchmarks/tokenizing.py                     # the ratio of both speeds, on 20 MB
    python benchmarks/tokenizing.py --mb 300 --rounds 0 # the memory and the speed of the whole command on 300 MB

The other side has the texts in memory already, and throws its ids away.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import median


def corpus(path: Path, mb: float) -> None:
    """JSON lines of words with frequencies like those of a language, 2 kB a document."""
    rng = random.Random(0)
    syllables = ["ka", "lo", "mi", "ter", "an", "sha", "ve", "no", "ri", "tun", "e", "pos"]
    words = ["".join(rng.choices(syllables, k=rng.randrange(1, 5))) for _ in range(30_000)]
    weights = [1 / (i + 1) for i in range(len(words))]
    drawn = rng.choices(words, weights, k=1_000_000)
    with path.open("w") as out:
        while out.tell() < mb * 1e6:
            start = rng.randrange(len(drawn) - 500)
            out.write(json.dumps({"text": " ".join(drawn[start : start + rng.randrange(50, 500)]) + "."}) + "\n")


def command(path: Path, tokenizer: Path, out: Path, workers: int) -> tuple[float, float]:
    """Seconds, and those of all processors, of ``olmo-fn tokenize``, the starts of all processes included."""
    words = [sys.executable, "-m", "olmo_fn", "tokenize", str(path), "--output", str(out), "--tokenizer", str(tokenizer)]
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*words, "--overwrite", "--workers", str(workers)], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - begin, busy


def largest(path: Path, tokenizer: Path, out: Path, workers: int) -> tuple[float, float]:
    """Seconds of the command, and the MB that the largest of its processes had at most."""
    words = [sys.executable, "-m", "olmo_fn", "tokenize", str(path), "--output", str(out), "--tokenizer", str(tokenizer)]
    begin, most = time.perf_counter(), 0.0
    with subprocess.Popen([*words, "--workers", str(workers)], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            time.sleep(0.2)
            for pid in (process.pid, *children(process.pid)):
                with suppress(OSError, StopIteration):  # it has ended
                    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                    most = max(most, int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024)
    return time.perf_counter() - begin, most


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    with suppress(OSError):
        return [int(one) for path in Path(f"/proc/{pid}/task").glob("*/children") for one in path.read_text().split()]
    return []


def library(path: Path, tokenizer: Path) -> tuple[float, float]:
    """Seconds, and those of all processors, of the library alone, in batches of 1,000 texts."""
    import tokenizers

    texts = [json.loads(line)["text"] for line in path.open()]
    backend = tokenizers.Tokenizer.from_file(str(tokenizer))
    begin, busy = time.perf_counter(), time.process_time()
    for start in range(0, len(texts), 1000):
        backend.encode_batch_fast(texts[start : start + 1000], add_special_tokens=False)
    return time.perf_counter() - begin, time.process_time() - busy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    from olmo_fn.data.tokenizer import train_bpe

    with tempfile.TemporaryDirectory() as folder:
        path, tokenizer, out = Path(folder, "a.jsonl"), Path(folder, "t.json"), Path(folder, "out")
        corpus(path, args.mb)
        texts = [json.loads(line)["text"] for _, line in zip(range(2000), path.open(), strict=False)]
        train_bpe(texts, 8000).save(tokenizer)
        size, ratios = path.stat().st_size / 1e6, []
        for _ in range(args.rounds):
            (ours, our_busy), (theirs, their_busy) = command(path, tokenizer, out, args.workers), library(path, tokenizer)
            ratios.append(theirs / ours)
            print(
                f"command {size / ours:.1f} MB/s, library {size / theirs:.1f} MB/s, ratio {ratios[-1]:.2f}; "
                f"processor time {our_busy:.1f} s and {their_busy:.1f} s, ratio {their_busy / our_busy:.2f}"
            )
        if ratios:
            print(f"median ratio {median(ratios):.2f} of {args.rounds} rounds, {args.workers} workers, {size:.0f} MB")
        else:
            seconds, peak = largest(path, tokenizer, out, args.workers)
            print(f"{size:.0f} MB in {seconds:.0f} s, {size / seconds:.1f} MB/s; the largest process had {peak:.0f} MB")


if __name__ == "__main__":
    main()
