"""A conversation with a model: what was said, and the cache of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from olmo_fn.data.template import ChatTemplate, Message, encode_chat
from olmo_fn.generate.config import Sampling
from olmo_fn.generate.memory import Memory
from olmo_fn.generate.text import LanguageModel, Prompt, check_text, stream_text


class Answer(NamedTuple):
    """The ``pieces`` of an answer as they come; how many of the oldest messages were left out to make room for it, and the
    most tokens that there is room for.
    """

    pieces: Iterator[str]
    left_out: int
    most: int


@dataclass
class Conversation:
    """A model, and what was said to it and by it, ``messages``; ``system`` stands before all of them."""

    model: LanguageModel
    template: ChatTemplate
    sampling: Sampling = field(default_factory=Sampling)
    system: str = ""
    forget: bool = False
    """Leave out the oldest messages when the context is full; refuse a new one otherwise."""
    messages: list[Message] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)

    def ask(self, text: str, on_token: Callable[[int], Any] = lambda token: None) -> Answer:
        """Say ``text``. ValueError, and nothing was said, if it does not fit into the context.

        An answer that is not read to its end, which closing its pieces says, stays as far as it was read.
        """
        check_text(text)
        messages = [*self.messages, {"role": "user", "content": text}]
        ids, left_out = self._fitting(messages)
        self.messages = messages[left_out:]
        most, context = self.sampling.max_tokens, self.model.context
        return Answer(self._pieces(ids, on_token), left_out, most if context is None else min(most, context - len(ids)))

    def _pieces(self, ids: list[int], on_token: Callable[[int], Any]) -> Iterator[str]:
        said, whole = "", False
        try:
            for piece in stream_text(self.model, Prompt(ids), self.sampling, on_token, self.memory):
                said += piece
                yield piece
            whole = True
        finally:
            if said or whole:
                self.messages.append({"role": "assistant", "content": said})
            else:
                self.messages.pop()

    def _fitting(self, messages: list[Message]) -> tuple[list[int], int]:
        """The ids of the messages, without so many of the oldest that they leave room for an answer."""
        model, first = self.model, [{"role": "system", "content": self.system}] if self.system else []
        context = model.context
        for left_out in range(0, len(messages), 2):
            ids = encode_chat(model.tokenizer, self.template, [*first, *messages[left_out:]])
            if context is None or len(ids) <= context - (model.room(self.sampling.max_tokens) if self.forget else 1):
                return ids, left_out
            if not self.forget:
                break
        way = "make it shorter" if self.forget else "begin anew (/reset), or start with --truncate-prompt left"
        raise ValueError(f"the conversation is {len(ids):,} tokens, and the model's context {context:,}; {way}")
