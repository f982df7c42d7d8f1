"""The gradient noise scale: how large a batch is worth its tokens (McCandlish et al. 2018).

Measured from what accumulation has anyway, gradients of small batches and of the one large batch: `accumulate_measured` stands
in the place of ``accumulate``, and `noise_scale` after the optimizer.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from olmo_fn.core.chain import Batch, Metrics, loss_tokens
from olmo_fn.core.gradients import Execution, Gradients, Grads, Signals
from olmo_fn.core.pipe import PARTS_CLIPPED, Transform, accumulate, slot
from olmo_fn.core.step import Scalars, State, Step
from olmo_fn.tree import Tree

SMALL, BIG, PARTS, TOKENS = "small_square", "big_square", "parts", "part_tokens"


def accumulate_measured(n: int) -> Transform[Grads, Grads]:
    """``accumulate(n)``, which also reports the squared norms of the parts' gradients and of the whole, for `noise_scale`.

    Part i has n_i of the batch's N loss tokens, and contributes g_i = (n_i / N) G_i to the gradient, with G_i the mean
    over its own tokens. The mean square is Σ (n_i / N) |G_i|² = Σ (N / n_i) |g_i|².
    """
    if n < 2:
        raise ValueError(f"accumulate_measured({n}): the noise is seen between parts of a batch; give it at least 2")

    def apply(inner: Grads) -> Grads:
        def part(params: Tree, batch: Batch, execution: Execution) -> Gradients:
            grads, metrics, signals = inner.fn(params, batch, execution).finished(execution)
            sharing = execution.layout.sharing
            tokens = sharing.count_tokens(batch)
            square = sharing.norm(grads).square() * (loss_tokens(batch) / tokens.clamp(min=1))
            return Gradients(grads, {**metrics, SMALL: square, PARTS: (tokens > 0).long(), TOKENS: tokens}, signals)

        whole = accumulate(n).apply(replace(inner, fn=part))

        def gradients(params: Tree, batch: Batch, execution: Execution) -> Gradients:
            found = whole.fn(params, batch, execution)
            return found._replace(metrics={**found.metrics, BIG: execution.layout.sharing.norm(found.tree).square()})

        return replace(inner, fn=gradients)

    return Transform(f"accumulate_measured({n})", Grads, Grads, apply, frozenset({"accumulate_measured"}), PARTS_CLIPPED)


def noise_scale(decay: float = 0.99) -> Transform[Step, Step]:
    """Report ``noise_scale`` in tokens, tr Σ / |G|²: the batch at which half of the gradient's square is noise.

    With n parts of together N tokens, of which the mean square of the parts' gradients is s and the square of the whole b
    (appendix A.1, here weighted by tokens, which is exact for uneven parts):

        |G|² = (n b - s) / (n - 1)          tr Σ = (s - b) N / (n - 1)

    Both are noisy and are averaged with ``decay`` before they are divided; they are in the slot ``noise_scale``. Tokens
    count as independent draws; those of one sequence are not quite. Steps with values that are not finite do not enter.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"noise_scale({decay}): the decay must be at least 0 and below 1")
    name = "noise_scale"

    def apply(inner: Step) -> Step:
        def init_control() -> Tree:
            zero = torch.zeros((), dtype=torch.float64)
            return {**inner.init_control(), name: {"signal": zero, "noise": zero.clone()}}

        def control(state: State, signals: Signals, metrics: Metrics) -> tuple[Tree, Scalars, Metrics]:
            if SMALL not in metrics:
                raise ValueError("noise_scale needs accumulate_measured(n) in the place of accumulate(n)")
            small, big, n, tokens = (metrics[key].double() for key in (SMALL, BIG, PARTS, TOKENS))
            now = {"signal": (n * big - small) / (n - 1), "noise": (small - big) * tokens / (n - 1)}
            finite = torch.stack(list(now.values())).isfinite().all()  # not with a single part, either
            before = state.slots[name]
            new = {k: torch.where(finite, decay * before[k] + (1 - decay) * now[k], before[k]) for k in now}
            scale = new["noise"] / new["signal"].clamp(min=0)  # inf: all noise
            rest = {k: v for k, v in metrics.items() if k not in (SMALL, BIG, PARTS, TOKENS)}
            own, scalars, report = inner.control(state, signals, rest)
            return {**own, name: new}, scalars, {**report, name: scale}

        return replace(inner, init_control=init_control, control=control)

    return Transform(f"noise_scale({decay})", Step, Step, apply, needs="accumulate_measured", **slot(name))
