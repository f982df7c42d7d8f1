"""Check and measure training on one GPU, most valuable first, within a time limit.

    python benchmarks/gpu.py --seconds 330 --out results    # on a machine with an NVIDIA GPU
    python benchmarks/gpu.py --fake                          # the logic of every section, at toy sizes, on a CPU
    python benchmarks/gpu.py --compare results/gpu.jsonl     # the same figures once more, beside those
    python benchmarks/gpu.py --expect                        # what the planner expects: benchmarks/gpu_expected.json

Needs torch (2.11 to 2.13), triton, numpy, safetensors, PyYAML, rich and tokenizers beside this checkout; for the section
``trainer`` cattrs as well. Every figure is a line of ``gpu.jsonl``, written at once; a table of all closes the output, with the
number of gates that passed and failed. Exit code 1 if one failed. The sections are in ``gpu_sections.py``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EXPECTED = Path(__file__).with_name("gpu_expected.json")


class Anything(ModuleType):
    """In the place of tyro, which writes command lines and which settings only carry annotations of."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __getitem__(self, of: Any) -> Any:
        return of


sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
try:
    import tyro  # noqa: F401
except ImportError:
    sys.modules["tyro"] = sys.modules["tyro.conf"] = Anything("tyro")

from olmo_fn.train.environment import prepare_environment  # noqa: E402

prepare_environment()
import torch  # noqa: E402
from gpu_sections import SECTIONS, Bench, collect, steps_of  # noqa: E402

from olmo_fn.train import machine  # noqa: E402


def code_hash() -> str:
    """That of the package's sources."""
    paths = sorted((ROOT / "olmo_fn").rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]


def expect() -> dict[str, Any]:
    """What the planner says of the steps: bytes at the peak, tokens a second, MFU."""
    from olmo_fn.planner.estimate import estimate
    from olmo_fn.planner.plan_input import plan_input

    found = {}
    for name, cfg in steps_of(fake=False).items():
        on_paper = estimate(plan_input(replace(cfg, gpus=1)))
        clock = on_paper.clock
        found[name] = {"bytes": on_paper.largest.total, "tokens_per_second": clock.tokens, "mfu": clock.mfu}
    return {"code": code_hash(), "steps": found}


def table(rows: list[dict[str, Any]], before: dict[tuple[str, str], Any]) -> str:
    """The figures with a gate or an expectation, and their ratios to those of before."""
    lines = []
    for row in rows:
        if not (row["gate"] or row["expected"] is not None or before):
            continue
        old = before.get((row["section"], row["figure"]))
        numbers = [x for x in (row["value"], old) if isinstance(x, (int, float)) and not isinstance(x, bool)]
        ratio = f"  x{numbers[0] / numbers[1]:.3f}" if len(numbers) == 2 and numbers[1] else ""
        verdict = {True: "ok", False: "FAILED", None: ""}[row["passed"]]
        expected = "" if row["expected"] is None else row["expected"]
        lines.append(
            f"{row['section']:<12}{row['figure']:<44}{row['value']!s:>14} {expected!s:>14}  {row['gate']} {verdict}{ratio}"
        )
    return "\n".join(lines)


def main() -> int:
    """Run the sections; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=330, help="end within so many")
    parser.add_argument("--out", default="results", help="folder of gpu.jsonl")
    parser.add_argument("--fake", action="store_true", help="run the logic alone, on a CPU")
    parser.add_argument("--only", nargs="*", help="names of sections")
    parser.add_argument("--compare", help="a gpu.jsonl of before, of the same device")
    parser.add_argument("--expect", action="store_true", help="write what the planner expects, and end")
    args = parser.parse_args()
    if args.expect:
        EXPECTED.write_text(json.dumps(expect(), indent=1) + "\n")
        return 0
    if not (args.fake or torch.cuda.is_available()):
        print(machine.unusable_gpu() or "there is no GPU here; --fake runs the logic on a CPU", file=sys.stderr)
        return 2
    device = torch.device("cpu" if args.fake else "cuda")
    machine.prepare(device)
    expected = json.loads(EXPECTED.read_text()) if EXPECTED.is_file() else {}
    if expected.get("code") != code_hash():
        print("gpu_expected.json is of other sources: its expectations may be old (--expect)", file=sys.stderr)
    before = {}
    if args.compare:
        old = [json.loads(line) for line in Path(args.compare).read_text().splitlines()]
        before = {(row["section"], row["figure"]): row["value"] for row in old}
        here = "cpu" if args.fake else torch.cuda.get_device_name()
        if before.get(("card", "device")) != here:
            print(f"{args.compare} is of {before.get(('card', 'device'))}, and this is {here}: no comparison", file=sys.stderr)
            return 2
    Path(args.out).mkdir(parents=True, exist_ok=True)
    with Path(args.out, "gpu.jsonl").open("w") as out:
        b = Bench(device, args.fake, time.monotonic() + args.seconds, out, expected)
        for section, seconds in SECTIONS:
            b.section = section.__name__
            if args.only and b.section not in args.only:
                continue
            if (left := b.end - time.monotonic()) < seconds / 2 and not args.fake:
                b.say("left out", f"{left:.0f} s are left, and it may take {seconds:g}")
                continue
            start = time.monotonic()
            try:
                section(b)
            except Exception as error:
                traceback.print_exc()
                b.say(
                    "error", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", None, "none", False
                )
            collect(b)
            b.say("seconds", round(time.monotonic() - start, 1))
    passed = sum(row["passed"] is True for row in b.rows)
    failed = sum(row["passed"] is False for row in b.rows)
    print(table(b.rows, before))
    print(f"{passed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
