"""A tokenizer in a GGUF file: the keys that llama.cpp reads, from a tokenizer.json, and a tokenizer.json from these keys.

Only byte-level byte-pair encodings, GPT-2's kind. llama.cpp knows the patterns that cut a text into words by names. Files that
are written here hold the tokenizer.json itself as well, in the key that GGUF has for it, and it is what is read then.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import tokenizers

from olmo_fn.data.tokenizer import WORDS

KEY = "tokenizer.ggml."
JSON, TEMPLATE = "tokenizer.huggingface.json", "tokenizer.chat_template"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
"""llama.cpp's types of tokens."""
GPT2 = "gpt2"
"""The pattern that the pre-tokenizer ByteLevel has in itself."""
DIGIT = r"\p{N}"
CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CL100K = rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{REST}"
QWEN2 = rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{REST}"
PATTERNS = {
    **dict.fromkeys(("gpt-2", "olmo", "phi-2"), (GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), (DIGIT, GPT2)),
    **dict.fromkeys(("dbrx", "smaug-bpe", "llama-bpe", "llama3", "llama-v3"), (CL100K,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (QWEN2,)),
}
"""What llama.cpp's names mean. The first of each kind is written."""
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3")
"""Those of them that take a word which is a token as that, without merging."""
SPECIAL = ("bos", "eos", "unk", "pad")
LONG = {"unk": "unknown", "pad": "padding"}
"""How llama.cpp calls these."""
LEAVE_OUT = "--no-tokenizer leaves it out"


class Described(NamedTuple):
    """The keys of a tokenizer, and what is to be said of it, if anything."""

    metadata: dict[str, Any]
    note: str = ""


def describe(text: str, vocab_size: int, special: Mapping[str, str], eos_id: int, template: str = "") -> Described:
    """The keys for the tokenizer.json ``text`` of a model with ``vocab_size`` ids.

    ``special``: the names of the tokens of `SPECIAL`, of those that there are. ValueError, one line, for another kind of
    tokenizer, or one whose patterns llama.cpp does not know.
    """
    raw, backend = json.loads(text), tokenizers.Tokenizer.from_str(text)
    model, patterns = raw["model"], patterns_of(raw.get("pre_tokenizer"))
    if model.get("type") != "BPE" or model.get("byte_fallback") or patterns is None:
        raise ValueError(f"the run's tokenizer is no byte-level BPE, and no other is written into a GGUF file; {LEAVE_OUT}")
    if not model["merges"]:
        raise ValueError(f"the run's tokenizer has no merges, and llama.cpp does not load one without; {LEAVE_OUT}")
    note = ""
    if patterns == (WORDS,):
        patterns = (CL100K,)
        note = (
            "llama.cpp has no name for how this tokenizer cuts a text into words; it is given the nearest (dbrx), and makes "
            "other tokens of some texts. Programs that read tokenizer.huggingface.json in the file make the same"
        )
    whole = bool(model.get("ignore_merges"))
    name = next((n for n, found in PATTERNS.items() if found == patterns and (n in WHOLE_WORDS) == whole), "")
    if not name:
        raise ValueError(f"llama.cpp has no name for the pre-tokenizer of the run's tokenizer; {LEAVE_OUT}")
    tokens, types = tokens_of(raw, vocab_size)
    ids = {"eos": eos_id} | {one: backend.token_to_id(content) for one, content in special.items()}
    before, after = around(backend)
    ids |= {"bos": before[0]} if before else {}
    metadata = {
        "model": "gpt2",
        "pre": name,
        "tokens": tokens,
        "token_type": types,
        "merges": [one if isinstance(one, str) else " ".join(one) for one in model["merges"]],
        "add_space_prefix": False,
        "add_bos_token": bool(before),
        "add_eos_token": after == [ids["eos"]],
        **{f"{LONG.get(one, one)}_token_id": number for one, number in ids.items() if number is not None},
    }
    rest = {JSON: text} | ({TEMPLATE: template} if template else {})
    return Described({KEY + key: value for key, value in metadata.items()} | rest, note)


def patterns_of(pre_tokenizer: Any) -> tuple[str, ...] | None:
    """The patterns that cut a text into words, one after the other; None where a step is another, or bytes are not the last.

    >>> patterns_of({"type": "ByteLevel", "add_prefix_space": False, "use_regex": True})
    ('gpt2',)
    """
    one = pre_tokenizer or {}
    steps = one["pretokenizers"] if one.get("type") == "Sequence" else [one]
    patterns: list[str] = []
    for step in steps:
        match step:
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                patterns.append(pattern)
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": True}:
                patterns.append(pattern)  # the pattern leaves nothing over
            case {"type": "Digits", "individual_digits": True}:
                patterns.append(DIGIT)
            case {"type": "ByteLevel", "add_prefix_space": False} if step is steps[-1]:
                return (*patterns, *([GPT2] if step.get("use_regex", True) else []))
            case _:
                break
    return None


def around(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that its post-processor puts before and behind a text."""
    plain, framed = (backend.encode("a", add_special_tokens=flag).ids for flag in (False, True))
    start = next(i for i in range(len(framed)) if framed[i : i + len(plain)] == plain)
    return framed[:start], framed[start + len(plain) :]


def tokens_of(raw: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Name and type of each of ``vocab_size`` ids; ids that are no tokens have names of their own."""
    added = {one["id"]: one for one in raw["added_tokens"]}
    names = {number: token for token, number in raw["model"]["vocab"].items()} | {n: one["content"] for n, one in added.items()}
    if (largest := max(names)) >= vocab_size:
        raise ValueError(f"the run's tokenizer has {largest + 1:,} ids and its model {vocab_size:,}; {LEAVE_OUT}")

    def kind(number: int) -> int:
        if number in added:
            return CONTROL if added[number]["special"] else USER_DEFINED
        return NORMAL if number in names else UNUSED

    return [names.get(n, f"[PAD{n}]") for n in range(vocab_size)], [kind(n) for n in range(vocab_size)]


def rebuilt(metadata: Mapping[str, Any]) -> str:
    """The tokenizer.json of a file; ValueError, with why, where it has none that can be made."""
    kind, pre = metadata.get(f"{KEY}model", "none"), metadata.get(f"{KEY}pre", "default")
    if kind in ("none", "no_vocab"):
        raise ValueError("it holds no tokenizer")
    if kind != "gpt2":
        raise ValueError(f"its tokenizer is of the kind {kind}, and only byte-level BPE (gpt2) is read")
    text = metadata.get(JSON)
    if not text and pre not in PATTERNS:
        raise ValueError(f"its pre-tokenizer is {pre}; known are {', '.join(PATTERNS)}")
    try:
        tokens = metadata[f"{KEY}tokens"]
        types = metadata.get(f"{KEY}token_type", [NORMAL] * len(tokens))
        wanted = {token: number for number, (token, one) in enumerate(zip(tokens, types, strict=True)) if one != UNUSED}
        text = text or json.dumps(tokenizer_json(metadata, tokens, types, pre), ensure_ascii=False)
        found = tokenizers.Tokenizer.from_str(text).get_vocab(with_added_tokens=True)
    except Exception as error:  # of many kinds, the library's bare
        raise ValueError(f"its tokenizer is damaged ({type(error).__name__}: {error})") from None
    if found != wanted:
        raise ValueError(f"its tokenizer is damaged: {JSON} holds other tokens than {KEY}tokens")
    return str(text)


def tokenizer_json(metadata: Mapping[str, Any], tokens: list[str], types: list[int], pre: str) -> dict[str, Any]:
    """What the ``tokenizers`` library loads."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": number, "content": token, **flags, "special": kind != USER_DEFINED}
        for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": GPT2 in PATTERNS[pre]}
    steps = [cut(pattern) for pattern in PATTERNS[pre] if pattern != GPT2] + [as_bytes]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if PATTERNS[pre] == (QWEN2,) else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": frame(metadata, tokens),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre in WHOLE_WORDS,
            "vocab": {token: number for number, token in enumerate(tokens) if types[number] != UNUSED},
            "merges": [one.split(" ", 1) for one in metadata.get(f"{KEY}merges") or []],
        },
    }


def cut(pattern: str) -> dict[str, Any]:
    """The step that cuts by a pattern."""
    if pattern == DIGIT:
        return {"type": "Digits", "individual_digits": True}
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def frame(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, Any] | None:
    """What puts the first and the last token around a text, if llama.cpp does."""
    always = metadata.get(f"{KEY}pre") in WHOLE_WORDS
    names = [
        name
        for name, usual in (("bos", always), ("eos", False))
        if metadata.get(f"{KEY}add_{name}_token", usual) and f"{KEY}{name}_token_id" in metadata
    ]
    if not names:
        return None
    ids = {name: metadata[f"{KEY}{name}_token_id"] for name in names}
    one = {name: {"SpecialToken": {"id": tokens[number], "type_id": 0}} for name, number in ids.items()}

    def framed(*sequences: str) -> list[dict[str, Any]]:
        inner = [{"Sequence": {"id": name, "type_id": 0}} for name in sequences]
        return [*([one["bos"]] if "bos" in one else []), *inner, *([one["eos"]] if "eos" in one else [])]

    known = {tokens[number]: {"id": tokens[number], "ids": [number], "tokens": [tokens[number]]} for number in ids.values()}
    return {"type": "TemplateProcessing", "single": framed("A"), "pair": framed("A", "B"), "special_tokens": known}


def special_tokens(metadata: Mapping[str, Any]) -> dict[str, int]:
    """The ids of the tokens of `SPECIAL`, of those that there are."""
    found = {name: metadata.get(f"{KEY}{LONG.get(name, name)}_token_id") for name in SPECIAL}
    return {name: number for name, number in found.items() if type(number) is int}
