"""Chat templates: a conversation as the text, and the tokens, that a model was trained to see it in.

A template is a Jinja program that comes with a model's files, and is not trusted: it runs in Jinja's sandbox, with the settings
and functions that transformers gives it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeAlias

from olmo_fn.data.tokenizer import Tokenizer

Message: TypeAlias = Mapping[str, Any]
"""A ``role`` (system, user, assistant) and its ``content``."""

MARK = "\ufdd0"  # a code point that is no character: put into a special token's name, it makes that plain text
BEGIN, END = "\ufdd1", "\ufdd2"  # around what ``{% generation %}`` marks
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class ChatTemplate:
    """A template's source, and the names of special tokens that it may use (``bos_token`` and so on)."""

    source: str
    tokens: Mapping[str, str] = field(default_factory=dict)

    @property
    def marks(self) -> bool:
        """Whether it says, by ``{% generation %}``, what the model says."""
        return re.search(r"{%-?\s*generation\b", self.source) is not None

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, keep_marks: bool = False, **variables: Any
    ) -> str:
        """The text of ``messages``; with ``add_generation_prompt``, up to where the model's answer begins.

        With ``keep_marks``, `BEGIN` and `END` stand around what is inside of ``{% generation %}``.
        ValueError for what the template refuses, or cannot do.

        >>> ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}").render(
        ...     [{"role": "user", "content": "hi"}]
        ... )
        '<user>hi'
        """
        given: dict[str, Any] = {"messages": [dict(message) for message in messages], "tools": None, "documents": None}
        given |= {"add_generation_prompt": add_generation_prompt, **self.tokens, **variables}
        program = self._compiled
        try:
            text = str(program.render(given))
            return text if keep_marks or not self.marks else text.replace(BEGIN, "").replace(END, "")
        except Exception as error:  # whatever a program may raise that somebody else wrote
            kind = "" if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: "
            raise ValueError(f"the chat template does not take this conversation: {kind}{error}") from None

    @cached_property
    def _compiled(self) -> Any:
        return _compile(self.source)


def encode_chat(tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Message]) -> list[int]:
    """The ids of a conversation up to where the model's answer begins.

    Names of special tokens that the template writes are these tokens; in what somebody said they are plain text.
    """
    disguise = disguiser(tokenizer)
    return encode_disguised(tokenizer, template.render([disguise(message) for message in messages]))


def disguiser(tokenizer: Tokenizer) -> Callable[[Message], Message]:
    """What makes names of special tokens in a message plain text, by a mark in them, in all that it has but the role."""
    marked, names, _ = _disguises(tokenizer.backend)

    def disguise(value: Any) -> Any:
        if isinstance(value, str):
            plain = re.sub(f"[{MARK}{BEGIN}{END}]", "", value)
            return names.sub(lambda found: marked[found[0]], plain)
        if isinstance(value, Mapping):
            return {key: disguise(x) for key, x in value.items()}
        return [disguise(x) for x in value] if isinstance(value, list | tuple) else value

    return lambda message: {key: x if key == "role" else disguise(x) for key, x in message.items()}


def encode_disguised(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of what a template wrote: names of special tokens are these, disguised ones plain text."""
    ids, end = [], 0
    for found in _disguises(tokenizer.backend)[2].finditer(text):
        ids += _with_special(tokenizer, text[end : found.start()])
        ids += tokenizer.encode(found[0].replace(MARK, ""))
        end = found.end()
    return ids + _with_special(tokenizer, text[end:])


def encode_parts(tokenizer: Tokenizer, parts: Sequence[tuple[str, bool]]) -> tuple[list[int], list[bool]]:
    """The ids of a whole conversation, given in pieces, ``eos_id`` at its end; and whether each is in the loss.

    Each piece is tokenized alone, as a prompt is when a model is to answer.
    """
    ids: list[int] = []
    mask: list[bool] = []
    for text, loss in parts:
        ids += encode_disguised(tokenizer, text)
        mask += [loss] * (len(ids) - len(mask))
    if not ids or ids[-1] != tokenizer.eos_id:
        ids.append(tokenizer.eos_id)
        mask.append(bool(parts) and parts[-1][1])
    return ids, mask


@lru_cache(maxsize=4)
def _disguises(backend: Any) -> tuple[dict[str, str], re.Pattern[str], re.Pattern[str]]:
    """Disguised names of special tokens by their names, and what finds names, and disguised ones."""
    special = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
    marked = {name: name[0] + MARK + name[1:] for name in sorted(special, key=len, reverse=True) if name}
    return marked, _any_of(marked), _any_of(marked.values())


def load_template(folder: Path, file: str = "") -> ChatTemplate:
    """The template ``file``, or that in ``folder``: ``chat_template.jinja``, or ``tokenizer_config.json``'s ``chat_template``.

    ValueError, with what to type, when there is none.
    """
    config = read_json(folder / "tokenizer_config.json")
    names = {name: value for name in NAMED if (value := config.get(name))}
    tokens = {name: str(value.get("content", "") if isinstance(value, dict) else value) for name, value in names.items()}
    own, inside = folder / "chat_template.jinja", config.get("chat_template")
    if isinstance(inside, list):  # several, by name
        named = (entry for entry in inside if isinstance(entry, dict))
        inside = next((entry.get("template") for entry in named if entry.get("name") == "default"), None)
    if file or own.is_file():
        inside = Path(file or own).read_text(encoding="utf-8")
    if not isinstance(inside, str):
        raise ValueError(
            f"{folder} has no chat template, as a model that was not trained to chat; it goes on from a text: "
            f"olmo-fn generate {folder} 'Once' (or give a template: --chat-template FILE)"
        )
    _compile(inside)
    return ChatTemplate(inside, tokens)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if there is no such file. ValueError, with the path, for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no object but {type(found).__name__}")
    return found


def _with_special(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of ``text``, in which the names of special tokens are these."""
    backend = tokenizer.backend
    backend.encode_special_tokens = False  # elsewhere a name is text
    try:
        return list(backend.encode(text.replace(MARK, ""), add_special_tokens=False).ids)
    finally:
        backend.encode_special_tokens = True


def _any_of(words: Any) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, words)) or "(?!)")


def _compile(source: str) -> Any:
    """The program of a template, as transformers makes it. ValueError, in one line, without Jinja, or if it is none."""
    try:
        import jinja2
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise ValueError('a chat template needs jinja2; install it with: pip install "olmo-fn[chat]"') from None

    class Generation(Extension):
        """``{% generation %}``, which marks what the model said for training on it."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            inside = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            begin, end = (jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)]) for mark in (BEGIN, END))
            return jinja2.nodes.Scope([begin, *inside, end]).set_lineno(line)

    class Namespace(jinja2.utils.Namespace):
        """Without names that begin with an underscore, which are Python's."""

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace takes no {name!r}, with an underscore before it")
            super().__setitem__(name, value)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
        # Jinja's own escapes what would be read as HTML.
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals["namespace"] = Namespace
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return made.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is wrong in line {error.lineno}: {error.message}") from None
