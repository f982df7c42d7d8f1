"""Which backend computes attention."""

from __future__ import annotations

from functools import partial

from olmo_fn.core.pipe import Transform, with_execution
from olmo_fn.core.step import Step
from olmo_fn.kernels.attention_table import choose


def attention(name: str) -> Transform[Step, Step]:
    """Attention by the backend of that name (`olmo_fn.kernels.attention_table.BACKENDS`), and by no other. Invisible but for
    rounding and speed. A step raises ValueError where it cannot do what a layer asks for.
    """
    return Transform(f"attention({name!r})", Step, Step, lambda step: with_execution(step, attention=partial(choose, name)))
