"""How to sample. Imports no torch, so that ``--help`` is quick."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when to stop."""

    max_tokens: int = 200
    """Most tokens to generate."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int = 0
    """Choose among this many likeliest tokens; 0: among all."""
    top_p: float = 0.95
    """Then among the fewest likeliest tokens whose probabilities add up to this; 1: among all."""
    stop: tuple[str, ...] = ()
    """Text to stop before, such as $'\\n\\n' in a shell; may be given several times."""
    seed: int = 0
    """Seed of the choices; the same seed, model and prompt give the same text."""

    def check(self) -> None:
        """Raise ValueError, in one line, for a value that cannot be."""
        if self.max_tokens < 1:
            raise ValueError(f"--max-tokens is {self.max_tokens}; it must be at least 1")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"--temperature is {self.temperature}; it must be 0 (greedy) or positive")
        if self.top_k < 0:
            raise ValueError(f"--top-k is {self.top_k}; it must be positive, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p is {self.top_p}; it must be above 0 and at most 1; 1 is all tokens")
        if "" in self.stop:
            raise ValueError("--stop has an empty text, which is everywhere; leave it out")
