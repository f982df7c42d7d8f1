"""Token after token, for a batch of prompts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from olmo_fn.generate.config import Sampling
from olmo_fn.generate.decode import Cache, empty_cache, extend
from olmo_fn.generate.memory import Memory
from olmo_fn.generate.sampling import choose, penalized, uniforms
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
    memory: Memory | None = None,
) -> Iterator[list[int | None]]:
    """At each step the new id of each row, or None for a row that has ended.

    A row ends after an id of ``stop_ids`` or ``sampling.stop_ids`` (which is still given) or ``sampling.max_tokens`` ids;
    ``sampling.stop`` is of no effect here, where there is no text. The choice for row ``i`` at a position
    depends on ``(seed, first_row + i, position)``, so a row is the same in any batch, and generating 10
    tokens and then 10 more, the first in the prompt, is generating 20. ``allowed`` (V,) booleans are the ids
    to choose from, and ``first_allowed`` (B, V) those of each row's first. ``memory``, for a single prompt, has what was read
    before, and then this. ValueError for an empty prompt, ids outside the vocabulary, and a model that computes NaN.

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
    if bad := [i for i in sampling.stop_ids if i >= cfg.vocab_size]:
        raise ValueError(f"--stop-ids {bad[0]}: the model's ids are 0 to {cfg.vocab_size - 1}")
    if memory is not None and len(prompts) != 1:
        raise ValueError(f"a memory is of one prompt, and there are {len(prompts)}; leave it out")
    if not prompts:
        return iter(())
    every = {*stop_ids, *sampling.stop_ids}
    return _sample(cfg, params, prompts, sampling, every, first_row, allowed, first_allowed, memory)


def _sample(
    cfg: Model,
    params: Tree,
    prompts: Sequence[Sequence[int]],
    how: Sampling,
    stop_ids: set[int],
    first_row: int,
    allowed: Tensor | None,
    first_allowed: Tensor | None,
    memory: Memory | None,
) -> Iterator[list[int | None]]:
    rows = range(first_row, first_row + len(prompts))
    ids, cache = _start(cfg, params, prompts, how.max_tokens, memory)
    seen = _seen(prompts, cfg.vocab_size, ids.device) if how.repetition_penalty != 1 else None
    read, running = list(prompts[0]), [True] * len(prompts)
    for n in range(how.max_tokens):
        if memory is not None:
            memory.cache = None  # used up; put back when it is whole again
        with torch.inference_mode():  # not around the yield, where it would reach the caller
            logits, cache = extend(cfg, params, ids, cache)
            if memory is not None:
                memory.put(read, cache)
            if not torch.isfinite(logits).all():
                raise ValueError("the model computes NaN or infinity; its weights are broken, take other ones")
            if seen is not None:
                logits = penalized(logits, seen, how.repetition_penalty)
            for mask in (allowed, first_allowed if n == 0 else None):
                if mask is not None:
                    logits = logits.masked_fill(~mask.to(logits.device), float("-inf"))
            uniform = uniforms(how.seed, rows, (len(prompt) + n for prompt in prompts))
            chosen = choose(logits, uniform, how.temperature, how.top_k, how.top_p, how.min_p)
            if seen is not None:
                seen.scatter_(1, chosen[:, None], True)
        numbers = chosen.tolist()
        yield [number if on else None for number, on in zip(numbers, running, strict=True)]
        running = [on and number not in stop_ids for number, on in zip(numbers, running, strict=True)]
        if not any(running):
            return
        ids, read = chosen[:, None], [*read, numbers[0]]


def _start(
    cfg: Model, params: Tree, prompts: Sequence[Sequence[int]], more: int, memory: Memory | None
) -> tuple[Tensor, Cache]:
    """The ids (B, T) int64 that are still to be read, padded at the left, and a cache for all and ``more - 1`` columns."""
    weight = params["embed"]
    length = max(map(len, prompts))
    padding = [length - len(prompt) for prompt in prompts]
    ids = torch.tensor([[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)], device=weight.device)
    pads = torch.tensor(padding, device=weight.device) if any(padding) else None
    with torch.inference_mode():
        if memory is not None:
            cache = memory.take(cfg, params, prompts[0], length + more - 1)
        else:
            cache = empty_cache(cfg, len(prompts), length + more - 1, pads, dtype=weight.dtype, device=weight.device)
    return ids[:, cache.length :], cache


def _seen(prompts: Sequence[Sequence[int]], V: int, device: torch.device) -> Tensor:
    """Which ids (B, V) each prompt has."""
    seen = torch.zeros(len(prompts), V, dtype=torch.bool, device=device)
    for row, prompt in zip(seen, prompts, strict=True):
        row[torch.tensor(prompt, device=device)] = True
    return seen
