"""``olmo-fn chat RUN``: a conversation in the terminal, or of the lines of a pipe."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import tyro

from olmo_fn.fields import PATH
from olmo_fn.generate.command import Trained
from olmo_fn.generate.config import Sampling

if TYPE_CHECKING:
    from olmo_fn.generate.chat import Conversation

WORDS = "/reset forgets what was said, /quit or Ctrl-D ends, Ctrl-C ends an answer"


@dataclass(frozen=True)
class Chat(Trained):
    """Talk with a trained model: a line is a message. /reset forgets what was said, /quit or the end of the input ends."""

    system: str = ""
    """What the model is told before all messages."""
    chat_template: Annotated[str, PATH] = ""
    """File of a chat template (Jinja), instead of the one that is beside the model."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=lambda: Sampling(max_tokens=1000))
    """How to sample."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, and no other signal."""


class Interrupt:
    """What Ctrl-C does. While the model writes it is obeyed after the token that is being computed, so that the cache stays
    whole; a second time, and at any other moment, at once.
    """

    def __init__(self) -> None:
        self.writing = self.asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self.writing or self.asked:
            raise Interrupted(number)
        self.asked = True

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Ctrl-C is this, inside the block; unless it is ignored, as nohup and a shell's background jobs have it."""
        before = signal.getsignal(signal.SIGINT)
        if before is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def run(args: Chat) -> int:
    """Answer each line of stdin on stdout, until it ends. What is no answer goes to stderr."""
    args.sampling.check()
    from olmo_fn.data.template import load_template
    from olmo_fn.generate.load import folder_of

    template = load_template(folder_of(args.run, args.step), args.chat_template)
    model, path = args.load()
    from olmo_fn.generate.chat import Conversation

    eos = model.tokenizer.backend.id_to_token(model.tokenizer.eos_id)
    template = replace(template, tokens={"eos_token": eos or "", **template.tokens})
    talk = Conversation(model, template, args.sampling, args.system, args.truncate_prompt == "left")
    typed, interrupt = sys.stdin.isatty(), Interrupt()
    if typed:
        with suppress(ImportError):
            import readline  # noqa: F401, which gives input() its keys and its history
        print(f"{path}: {WORDS}", file=sys.stderr)
    with interrupt.caught():
        for line in lines(typed):
            if line == "/quit":
                break
            if line == "/reset":
                talk.messages = []
            elif re.fullmatch(r"/\w*", line):
                print(f"{line} is no command: {WORDS}", file=sys.stderr)
            elif line.strip():
                answer(talk, line, interrupt)
    return 0


def lines(typed: bool) -> Iterator[str]:
    """The lines of stdin; behind a prompt if somebody types them, and then Ctrl-C drops what was typed."""
    while True:
        try:
            yield input("> " if typed else "")
        except EOFError:
            if typed:
                print(file=sys.stderr)
            return
        except Interrupted:
            if not typed:
                raise
            print(f"\n{WORDS}", file=sys.stderr)


def answer(talk: Conversation, text: str, interrupt: Interrupt) -> None:
    """Print the answer to ``text`` as it comes; Ctrl-C ends it."""
    tokens: list[int] = []

    def on_token(token: int) -> None:
        tokens.append(token)
        interrupt.writing = True
        if interrupt.asked:
            raise Interrupted(signal.SIGINT)

    try:
        pieces, left_out, most = talk.ask(text, on_token)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return
    if left_out:
        print(f"the oldest {left_out} messages were left out (--truncate-prompt left)", file=sys.stderr)
    try:
        with closing(pieces):  # type: ignore[type-var]
            for piece in pieces:
                print(piece, end="", flush=True)
    except Interrupted:
        pass
    finally:
        interrupt.writing = interrupt.asked = False
        print(flush=True)
    if len(tokens) == most and tokens[-1] not in talk.model.ends:
        print(f"the answer was cut after {most:,} tokens (--max-tokens, or the model's context)", file=sys.stderr)
