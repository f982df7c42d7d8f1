"""Text in, text out: prompts to tokens, and tokens to text as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from olmo_fn.data.tokenizer import Tokenizer
from olmo_fn.generate.config import Sampling
from olmo_fn.generate.healing import heal
from olmo_fn.generate.sample import sample
from olmo_fn.models.config import Model
from olmo_fn.tree import Tree

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what bytes that are not yet a character decode to


class LanguageModel(NamedTuple):
    """What generating text needs; ``context`` is the most tokens with the prompt, or None for no limit."""

    cfg: Model
    params: Tree
    tokenizer: Tokenizer
    context: int | None = None


class Prompt(NamedTuple):
    """``ids`` to go on from; ``text`` that their continuation begins with; which ids may begin it (V,)."""

    ids: list[int]
    text: str = ""
    first_allowed: Tensor | None = None


def generate_text(model: LanguageModel, prompt: str, sampling: Sampling | None = None, *, healing: bool = True) -> str:
    """What follows ``prompt``; an empty one begins a document.

    It ends with the document, before any text of ``sampling.stop``, after ``sampling.max_tokens`` tokens, or
    when the model's context is full. ``healing``: see `olmo_fn.generate.healing`. ValueError for a prompt
    that leaves no room in the context.

    >>> from olmo_fn.data.tokenizer import byte_level
    >>> from olmo_fn.models.config import dense
    >>> from olmo_fn.models.transformer import specs
    >>> from olmo_fn.spec import init
    >>> cfg = dense(8, 1, 2, 16, vocab_size=257)
    >>> model = LanguageModel(cfg, init(specs(cfg), seed=0), byte_level())
    >>> len(generate_text(model, "def ", Sampling(max_tokens=8))) <= 8
    True
    """
    return "".join(stream_text(model, prepare(model, prompt, healing), sampling))


def prepare(model: LanguageModel, prompt: str, healing: bool = True) -> Prompt:
    """The tokens of ``prompt``; the end-of-document token if there are none. Errors as `generate_text`."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the prompt {prompt!a} is not valid UTF-8") from None
    ids = model.tokenizer.encode(prompt) or [model.tokenizer.eos_id]
    if model.context is not None and len(ids) >= model.context:
        raise ValueError(
            f"the prompt is {len(ids):,} tokens, and the model's context {model.context:,}; "
            f"shorten it to at most {model.context - 1:,}"
        )
    return Prompt(*heal(model.tokenizer, ids, model.cfg.vocab_size)) if healing else Prompt(ids)


def stream_text(
    model: LanguageModel,
    prompt: Prompt,
    sampling: Sampling | None = None,
    on_token: Callable[[int], Any] = lambda token: None,
) -> Iterator[str]:
    """The pieces of `generate_text` as they come, of whole characters; ``on_token`` gets each new id."""
    how = sampling or Sampling()
    if model.context is not None:
        how = replace(how, max_tokens=min(how.max_tokens, model.context - len(prompt.ids)))
    known, eos = torch.arange(model.cfg.vocab_size) < model.tokenizer.vocab_size, model.tokenizer.eos_id
    first = None if prompt.first_allowed is None else prompt.first_allowed[None]
    steps = sample(model.cfg, model.params, [prompt.ids], how, stop_ids=(eos,), allowed=known, first_allowed=first)
    ids = _seen_by(on_token, (step[0] for step in steps if step[0] is not None))
    pieces = decoded(model.tokenizer, (i for i in ids if i != eos))
    return until(without(pieces, len(prompt.text)), how.stop)


def decoded(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """``tokenizer.decode(ids)`` in pieces, each as soon as it is certain.

    >>> from olmo_fn.data.tokenizer import byte_level
    >>> list(decoded(byte_level(), byte_level().encode("aé!")))
    ['a', 'é', '!']
    """
    bytewise = tokenizer.byte_lengths is not None
    pending: list[int] = []
    given = ""  # of the text of pending
    for i in ids:
        pending.append(i)
        text = tokenizer.decode(pending)
        whole = text.rstrip(UNFINISHED)
        if len(whole) > len(given) and whole.startswith(given):
            yield whole[len(given) :]
            given = whole
        if bytewise and given == text:
            # Other tokenizers may write a token differently at the start of a text: they keep all of it.
            pending, given = [], ""
    if rest := tokenizer.decode(pending)[len(given) :]:
        yield rest


def without(pieces: Iterable[str], count: int) -> Iterator[str]:
    """The text of ``pieces`` without its first ``count`` characters.

    >>> list(without(["a", "bcd", "e"], 2))
    ['cd', 'e']
    """
    for piece in pieces:
        if rest := piece[count:]:
            yield rest
        count = max(0, count - len(piece))


def until(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """The text of ``pieces`` up to the first that is complete of ``stops``, wherever the pieces are cut.

    What could be the beginning of a stop is held back until it is known not to be.

    >>> "".join(until(["ab", "c\\n", "\\nd"], ["\\n\\n"]))
    'abc'
    """
    held = ""
    for piece in pieces:
        held += piece
        found = [(at + len(stop), at) for stop in stops if (at := held.find(stop)) >= 0]
        if found:
            if text := held[: min(found)[1]]:
                yield text
            return
        sure = len(held) - max((_overlap(held, stop) for stop in stops), default=0)
        if sure:
            yield held[:sure]
            held = held[sure:]
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of ``stop`` that ``text`` ends with."""
    return next(n for n in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:n]))


def _seen_by(watch: Callable[[int], Any], ids: Iterable[int]) -> Iterator[int]:
    for i in ids:
        watch(i)
        yield i
