"""``olmo-fn replay RUN --step 120``: a step of an old run once more, and the text it saw."""

from __future__ import annotations

import sys
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from olmo_fn.replay.replay import Replay


@dataclass(frozen=True)
class Arguments:
    """Replay a step of a run, bit for bit, and print the sequences of its batch, the largest gradient first."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Folder of a run."""
    step: int | None = None
    """Step to replay, from 1. Without it, the one whose loss is furthest above those of the steps before it."""
    texts: int = 3
    """Sequences whose text is printed."""
    chars: int = 400
    """Characters of each text; 0 prints all."""


def run(args: Arguments) -> int:
    """Print the replayed step; 1 when it is not bit for bit what the run recorded."""
    from olmo_fn.replay.replay import largest_spike, replay

    step = args.step if args.step is not None else largest_spike(args.run)
    found = replay(args.run, step, say=lambda line: print(line, file=sys.stderr))
    print(describe(found, args.texts, args.chars))
    return 1 if found.differences else 0


def describe(found: Replay, texts: int = 3, chars: int = 400) -> str:
    """What was replayed, whether it is the same, and which sequences pulled hardest."""
    origin = found.checkpoint or "the initial weights"
    count = found.step - found.start
    what = f"replayed {count} step{'s' if count > 1 else ''} from {origin}"
    values = ", ".join(found.metrics)
    if found.differences:
        lines = [f"{what}: NOT what metrics.jsonl says (another machine, number of threads, config or data?)"]
        lines += [f"  {line}" for line in found.differences[:5]]
        lines += [f"  … {len(found.differences) - 5} more"] if len(found.differences) > 5 else []
    else:
        lines = [f"{what}: equal to metrics.jsonl, bit for bit ({values})"]
    lines += [f"step {found.step}: " + ", ".join(f"{name} {shown(value)}" for name, value in found.metrics.items()), ""]
    lines += ["row  loss a token  |gradient|  tokens  from"]
    for s in found.sequences:
        lines.append(f"{s.row:>3}  {s.loss:>12.4f}  {s.grad_norm:>10.4f}  {s.tokens:>6}  {s.file} at token {s.offset:,}")
    for s in found.sequences[:texts]:
        text = s.text if s.text is not None else " ".join(map(str, s.ids))
        cut = text if not chars or len(text) <= chars else text[:chars] + " …"
        lines += ["", f"row {s.row}:", textwrap.indent(cut, "  | ", lambda line: True)]
    return "\n".join(lines)


def shown(value: float | list[float]) -> str:
    """A metric in six digits, a vector of them in brackets.

    >>> shown([0.25, 1e-7])
    '[0.25, 1e-07]'
    """
    return "[" + ", ".join(map(shown, value)) + "]" if isinstance(value, list) else f"{value:.6g}"
