"""Learning-rate schedules: pure functions of a 0-d integer tensor, in fp64, which compile.

They count steps, the first of which is 1, or tokens: all lengths are in that unit, or, as a float, a fraction of
``total``. Formulas and the ≤ / < at the ends of the phases are OLMo-core's, so a run there has the same rates here; where it
raises or falls below 0, the docstrings say what happens here.
"""

from olmo_fn.optim.schedules.base import Length, Schedule, constant, whole
from olmo_fn.optim.schedules.compose import Piece, anneal, in_tokens, join, piecewise, scale, sequential, then
from olmo_fn.optim.schedules.decay import power, warmup_cosine_linear, wsd, wsds
from olmo_fn.optim.schedules.range_test import exponential
from olmo_fn.optim.schedules.warmup import (
    warmup_constant,
    warmup_cosine,
    warmup_half_cosine,
    warmup_inv_sqrt,
    warmup_linear,
)

__all__ = [
    "Length",
    "Piece",
    "Schedule",
    "anneal",
    "constant",
    "exponential",
    "in_tokens",
    "join",
    "piecewise",
    "power",
    "scale",
    "sequential",
    "then",
    "warmup_constant",
    "warmup_cosine",
    "warmup_cosine_linear",
    "warmup_half_cosine",
    "warmup_inv_sqrt",
    "warmup_linear",
    "whole",
    "wsd",
    "wsds",
]
