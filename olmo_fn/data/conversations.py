"""Conversations as documents: the text that a chat template makes of them, and which pieces of it are learned."""

from __future__ import annotations

import re
from typing import Any, Literal, TypeAlias

from olmo_fn.data.template import BEGIN, END, ChatTemplate, Message

LossOn: TypeAlias = Literal["assistant", "last", "all"]
"""What is in the loss: what assistants say, only the last time, or everything."""


def messages_of(record: Any, field: str, where: str, skip_missing: bool = False) -> list[Message] | None:
    """The messages in ``field`` of ``record``. ValueError, with where it is, if there are none; None with ``skip_missing``."""
    value = record
    for name in [field] if isinstance(record, dict) and field in record else field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if isinstance(value, list) and value and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value):
        return [{key: x for key, x in message.items() if x is not None} for message in value]  # as columns of tables fill up
    if skip_missing:
        return None
    there = ", ".join(record) if isinstance(record, dict) else type(record).__name__
    raise ValueError(
        f"{where} has no messages in {field!r}, a list of objects with a role; there is: {there:.300}; name the field with "
        "--text-field; --skip-missing passes such documents over"
    )


def pieces(template: ChatTemplate, messages: list[Message], loss_on: LossOn, where: str) -> list[tuple[str, bool]]:
    """The text of a conversation, in pieces that are in the loss or not.

    What assistants say is inside of ``{% generation %}``, where the template has that; or else goes from where the template
    would have an answer begin to where the messages up to it end.
    """
    try:
        text = template.render(messages, add_generation_prompt=False, keep_marks=True)
        if loss_on == "all":
            return [(text.replace(BEGIN, "").replace(END, ""), True)]
        found = _marked(text) if template.marks else _by_turns(template, text, messages)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if loss_on == "last":
        last = max((i for i, (_, loss) in enumerate(found) if loss), default=-1)
        found = [(piece, loss and i == last) for i, (piece, loss) in enumerate(found)]
    return [(piece, loss) for piece, loss in found if piece]


def _marked(text: str) -> list[tuple[str, bool]]:
    return [(piece, i % 2 == 1) for i, piece in enumerate(re.split(f"[{BEGIN}{END}]", text))]


def _by_turns(template: ChatTemplate, text: str, messages: list[Message]) -> list[tuple[str, bool]]:
    found, at = [], 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        begin = template.render(messages[:i], add_generation_prompt=True)
        end = template.render(messages[: i + 1], add_generation_prompt=False)
        end = end if text.startswith(end) else end.rstrip()  # some templates end the last turn with a line break more
        if not (text.startswith(begin) and len(begin) <= len(end) and text.startswith(end)):
            raise ValueError(
                f"the chat template writes message {i + 1} otherwise than it asks for it, so it is not known which tokens the "
                "assistant says; mark them in the template with {% generation %} … {% endgeneration %}"
            )
        found += [(text[at : len(begin)], False), (text[len(begin) : len(end)], True)]
        at = len(end)
    return [*found, (text[at:], False)]
