"""How to sample. Imports no torch, so that ``--help`` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from olmo_fn.fields import AT_LEAST_ONE, POSITIVE, SIGNED, Range, check_values


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when to stop."""

    max_tokens: Annotated[int, AT_LEAST_ONE] = 200
    """Most tokens to generate."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int = 0
    """Choose among this many likeliest tokens; 0: among all."""
    top_p: Annotated[float, Range(0, 1, above=True)] = 0.95
    """Then among the fewest likeliest tokens whose probabilities add up to this; 1: among all."""
    min_p: Annotated[float, Range(0, 1)] = 0.0
    """Then among those at least this many times as likely as the likeliest; 0: among all."""
    repetition_penalty: Annotated[float, POSITIVE] = 1.0
    """Divides the positive logits of tokens that the prompt or the text has already, and multiplies the negative ones;
    1: no penalty."""
    stop: tuple[str, ...] = ()
    """Text to stop before, such as $'\\n\\n' in a shell; may be given several times."""
    stop_ids: tuple[int, ...] = ()
    """Token ids to stop at, besides the end of the document; may be given several times."""
    seed: Annotated[int, SIGNED] = 0
    """Seed of the choices; the same seed, model and prompt give the same text."""

    def check(self) -> None:
        """Raise ValueError, in one line, for a value that cannot be."""
        check_values(self)
        if "" in self.stop:
            raise ValueError("--stop has an empty text, which is everywhere; leave it out")
