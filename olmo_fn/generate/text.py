"""Text in, text out: prompts to tokens, and tokens to text as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice, tee
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from olmo_fn.data.tokenizer import Tokenizer
from olmo_fn.generate.config import Sampling
from olmo_fn.generate.healing import heal
from olmo_fn.generate.memory import Memory
from olmo_fn.generate.sample import sample
from olmo_fn.models.config import Model
from olmo_fn.tree import Tree

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what bytes that are not yet a character decode to


class LanguageModel(NamedTuple):
    """What generating text needs; ``context`` is the most tokens with the prompt, or None for no limit.

    A text begins with ``first_ids``, and ends at the tokenizer's end of a document or at one of ``stop_ids``.
    """

    cfg: Model
    params: Tree
    tokenizer: Tokenizer
    context: int | None = None
    first_ids: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = ()

    @property
    def ends(self) -> set[int]:
        """The ids that end a text."""
        return {self.tokenizer.eos_id, *self.stop_ids}

    def room(self, tokens: int) -> int:
        """How many of ``tokens`` to generate to leave room for when a prompt is cut: at most half of the context."""
        return tokens if self.context is None else min(tokens, self.context - self.context // 2)


class Prompt(NamedTuple):
    """``ids`` to go on from; ``text`` that their continuation begins with; which ids may begin it (V,).

    ``cut``: how many tokens at its beginning were left out.
    """

    ids: list[int]
    text: str = ""
    first_allowed: Tensor | None = None
    cut: int = 0


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


def prepare(model: LanguageModel, prompt: str, healing: bool = True, room: int | None = None) -> Prompt:
    """The tokens of ``prompt``; the end-of-document token if there are none. Errors as `generate_text`.

    With ``room``, a prompt that leaves no room for so many tokens in the context is cut at its beginning instead.
    """
    check_text(prompt)
    first, ids, cut = list(model.first_ids), model.tokenizer.encode(prompt), 0
    if not first and not ids:
        ids = [model.tokenizer.eos_id]
    if model.context is not None:
        if room is not None:
            cut = max(0, len(first) + len(ids) - (model.context - room))
        elif len(first) + len(ids) >= model.context:
            raise ValueError(
                f"the prompt is {len(first) + len(ids):,} tokens, and the model's context {model.context:,}; "
                f"shorten it to at most {model.context - 1:,}, or give --truncate-prompt left"
            )
    ids = first + ids[cut:]
    healed = heal(model.tokenizer, ids, model.cfg.vocab_size) if healing else (ids,)
    return Prompt(*healed)._replace(cut=cut)


def check_text(text: str) -> None:
    """ValueError for what is no text, as a word of the command line may be that is not in the terminal's encoding."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the prompt {text!a} is not valid UTF-8") from None


def stream_text(
    model: LanguageModel,
    prompt: Prompt,
    sampling: Sampling | None = None,
    on_token: Callable[[int], Any] = lambda token: None,
    memory: Memory | None = None,
) -> Iterator[str]:
    """The pieces of `generate_text` as they come, of whole characters; ``on_token`` gets each new id.

    ``memory`` has what was read before, and then this.
    """
    return stream_texts(model, [prompt], sampling, lambda _, token: on_token(token), memory=memory)[0]


def stream_texts(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    sampling: Sampling | None = None,
    on_token: Callable[[int, int], Any] = lambda row, token: None,
    *,
    first_row: int = 0,
    memory: Memory | None = None,
) -> list[Iterator[str]]:
    """For each of ``prompts`` what `stream_text` gives, computed as one batch: join one after the other.

    Row ``i`` draws as row ``first_row + i`` (`olmo_fn.generate.sample.sample`); ``on_token`` gets the row and each new id.
    """
    how, V, stops = sampling or Sampling(), model.cfg.vocab_size, model.ends
    context = inf if model.context is None else model.context
    most = [int(min(how.max_tokens, context - len(prompt.ids))) for prompt in prompts]
    everything = torch.ones(V, dtype=torch.bool)
    known = everything.cumsum(0) <= model.tokenizer.vocab_size
    first = [everything if prompt.first_allowed is None else prompt.first_allowed for prompt in prompts]
    steps = sample(
        model.cfg,
        model.params,
        [prompt.ids for prompt in prompts],
        replace(how, max_tokens=max(most)),
        stop_ids=stops,
        first_row=first_row,
        allowed=None if known.all() else known,
        first_allowed=torch.stack(first) if any(prompt.first_allowed is not None for prompt in prompts) else None,
        memory=memory,
    )
    stops |= {*how.stop_ids}

    def ids(row: int, steps: Iterator[list[int | None]]) -> Iterator[int]:
        for step in islice(steps, most[row]):
            if (token := step[row]) is None:
                return
            on_token(row, token)
            if token not in stops:
                yield token

    # Each row takes the steps that others have taken already, and then further ones, until it needs no more.
    pieces = [decoded(model.tokenizer, ids(row, copy)) for row, copy in enumerate(tee(steps, len(prompts)))]
    return [until(without(text, len(prompt.text)), how.stop) for text, prompt in zip(pieces, prompts, strict=True)]


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
