"""Token after token, for a batch of prompts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from olmo_fn.generate.config import Sampling
from olmo_fn.generate.decode import Cache, empty_cache, extend
from olmo_fn.generate.sampling import choose, uniforms
from olmo_fn.models.config import Model
from olmo_fn.tree import Tree


def sample(
    cfg: Model,
    params: Tree,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | None = None,
    *,
    stop_ids: Collection[int] = (),
    first_row: int = 0,
    allowed: Tensor | None = None,
    first_allowed: Tensor | None = None,
) -> Iterator[list[int | None]]:
    """At each step the new id of each row, or None for a row that has ended.

    A row ends after an id of ``stop_ids`` (which is still given) or ``sampling.max_tokens`` ids;
    ``sampling.stop`` is of no effect here, where there is no text. The choice for row ``i`` at a position
    depends on ``(seed, first_row + i, position)``, so a row is the same in any batch, and generating 10
    tokens and then 10 more, the first in the prompt, is generating 20. ``allowed`` (V,) booleans are the ids
    to choose from, and ``first_allowed`` (B, V) those of each row's first. ValueError for an empty prompt,
    ids outside the vocabulary, and a model that computes NaN.

    >>> from olmo_fn.models.config import dense
    >>> from olmo_fn.models.transformer import specs
    >>> from olmo_fn.spec import init
    >>> cfg = dense(8, 1, 2, 16, vocab_size=11)
    >>> steps = sample(cfg, init(specs(cfg), seed=0), [[1, 2], [3]], Sampling(max_tokens=3))
    >>> [len(step) for step in steps]
    [2, 2, 2]
    """
    sampling = sampling or Sampling()
    sampling.check()
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty; a model needs a token to go on from, such as end of document")
        if bad := [t for t in prompt if not 0 <= t < cfg.vocab_size]:
            raise ValueError(f"prompt {i} has the id {bad[0]}; the model's ids are 0 to {cfg.vocab_size - 1}")
    if not prompts:
        return iter(())
    return _sample(cfg, params, prompts, sampling, set(stop_ids), first_row, allowed, first_allowed)


def _sample(
    cfg: Model,
    params: Tree,
    prompts: Sequence[Sequence[int]],
    how: Sampling,
    stop_ids: set[int],
    first_row: int,
    allowed: Tensor | None,
    first_allowed: Tensor | None,
) -> Iterator[list[int | None]]:
    rows = range(first_row, first_row + len(prompts))
    ids, cache = _start(cfg, params, prompts, how.max_tokens)
    running = [True] * len(prompts)
    for n in range(how.max_tokens):
        with torch.inference_mode():  # not around the yield, where it would reach the caller
            logits, cache = extend(cfg, params, ids, cache)
            if not torch.isfinite(logits).all():
                raise ValueError("the model computes NaN or infinity; its weights are broken, take other ones")
            for mask in (allowed, first_allowed if n == 0 else None):
                if mask is not None:
                    logits = logits.masked_fill(~mask.to(logits.device), float("-inf"))
            uniform = uniforms(how.seed, rows, (len(prompt) + n for prompt in prompts))
            chosen = choose(logits, uniform, how.temperature, how.top_k, how.top_p)
        numbers = chosen.tolist()
        yield [number if on else None for number, on in zip(numbers, running, strict=True)]
        running = [on and number not in stop_ids for number, on in zip(numbers, running, strict=True)]
        if not any(running):
            return
        ids = chosen[:, None]


def _start(cfg: Model, params: Tree, prompts: Sequence[Sequence[int]], more: int) -> tuple[Tensor, Cache]:
    """The prompts (B, T) int64, padded at the left, and a cache for them and ``more - 1`` columns."""
    weight = params["embed"]
    length = max(map(len, prompts))
    padding = [length - len(prompt) for prompt in prompts]
    ids = torch.tensor([[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)])
    pads = torch.tensor(padding, device=weight.device) if any(padding) else None
    options = {"dtype": weight.dtype, "device": weight.device}
    with torch.inference_mode():
        cache = empty_cache(cfg, len(prompts), length + more - 1, pads, **options)
    return ids.to(weight.device), cache
