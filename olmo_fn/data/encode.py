"""Chunks of documents to token ids, in any number of processes, in the order of the chunks."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from olmo_fn.data.conversations import LossOn, messages_of, pieces
from olmo_fn.data.decontaminate import load_grams
from olmo_fn.data.dedup import Dedup, keys
from olmo_fn.data.documents import Chunk, records, text_of
from olmo_fn.data.filters import open_filter, version
from olmo_fn.data.template import MARK, ChatTemplate, disguiser, encode_parts
from olmo_fn.data.tokenizer import Tokenizer, load

NO_TEXT, NO_ANSWER = "without a text", "without an answer"


class Encoded(NamedTuple):
    """D documents of N tokens, each with its end-of-document token."""

    ids: np.ndarray
    """(N,) of the type of the token files."""
    mask: np.ndarray
    """(N,) bool: whose prediction is in the loss; (0,) where there are no masks."""
    lengths: np.ndarray
    """(D,) int64 tokens."""
    num_bytes: np.ndarray
    """(D,) int64 bytes of the text in UTF-8."""
    keys: np.ndarray
    """(D, K) uint64, as `olmo_fn.data.dedup` has them."""

    def only(self, kept: np.ndarray) -> Encoded:
        """The documents that are ``kept``, (D,) bool."""
        if kept.all():
            return self
        tokens = np.repeat(kept, self.lengths)
        mask = self.mask[tokens] if len(self.mask) else self.mask
        return Encoded(self.ids[tokens], mask, self.lengths[kept], self.num_bytes[kept], self.keys[kept])


class Document(NamedTuple):
    """A text, and the pieces that it is made of, with whether they are in the loss."""

    text: str
    parts: list[tuple[str, bool]]


class Result(NamedTuple):
    """What a chunk becomes."""

    train: Encoded
    heldout: Encoded
    dropped: Counter[str]
    """Documents that are not in it, by the reason."""
    report: list[str]
    """A line of JSON for each document that has something of an evaluation set."""


@dataclass(frozen=True)
class Encoder:
    """How to encode, in values that another process can be told."""

    tokenizer: str
    """Path of a tokenizer.json."""
    eos: str
    field: str
    heldout: float
    """Part of the documents to hold out, from 0 to 1."""
    dtype: str
    skip_missing: bool = False
    special_tokens: bool = False
    """Whether names of special tokens in a text are these tokens."""
    template: ChatTemplate | None = None
    """That of conversations, if the documents are some."""
    loss_on: LossOn = "assistant"
    filters: tuple[str, ...] = ()
    dedup: Dedup = "none"
    similarity: float = 0.8
    grams: str = ""
    """Path of the n-grams that a document must not have; empty: there are none."""

    def __call__(self, chunk: Chunk) -> Result:
        """The training and the held-out documents of ``chunk``."""
        tokenizer = self._tokenizer
        sides: tuple[list[Document], list[Document]] = ([], [])
        dropped: Counter[str] = Counter()
        report: list[str] = []
        for where, parts in self.documents(chunk):
            document = Document("".join(piece for piece, _ in parts or ()).replace(MARK, ""), parts or [])
            if reason := NO_TEXT if parts is None else self._reason(document, where, report):
                dropped[reason] += 1
            else:
                sides[is_heldout(document.text, self.heldout)].append(document)
        train, heldout = (self._encoded(tokenizer, side) for side in sides)
        return Result(train, heldout, dropped, report)

    def documents(self, chunk: Chunk) -> Iterator[tuple[str, list[tuple[str, bool]] | None]]:
        """Where each document of ``chunk`` is, and its pieces, with whether they are in the loss; None without a text."""
        for where, record in records(chunk, self.field):
            if self.template:
                messages = messages_of(record, self.field, where, self.skip_missing)
                if messages and not self.special_tokens:
                    messages = [*map(disguiser(self._tokenizer), messages)]
                yield where, None if messages is None else pieces(self.template, messages, self.loss_on, where)
            else:
                text = record if chunk.whole else text_of(record, self.field, where, self.skip_missing)
                yield where, None if text is None else [(text, True)]

    @property
    def _tokenizer(self) -> Tokenizer:
        return _load(self.tokenizer, version(self.tokenizer), self.eos, self.special_tokens)

    def _reason(self, document: Document, where: str, report: list[str]) -> str:
        """Why a document is left out; empty if it is not."""
        text = document.text
        if not any(loss for _, loss in document.parts):
            return NO_ANSWER
        for word in self.filters:
            try:
                kept = open_filter(word)(text)
            except Exception as error:  # of somebody else's function
                raise ValueError(f"--filter {word} fails for {where}: {type(error).__name__}: {error}") from None
            if not isinstance(kept, bool | np.bool_):
                raise ValueError(f"--filter {word} returns {kept!r} for {where}; it must be True for what is kept, or False")
            if not kept:
                return f"filter {word}"
        if self.grams and (found := load_grams(self.grams, version(self.grams)).find(text)):
            report.append(json.dumps({"set": found[0], "document": where, "ngram": found[1]}, ensure_ascii=False))
            return f"evaluation set {found[0]}"
        return ""

    def _encoded(self, tokenizer: Tokenizer, documents: list[Document]) -> Encoded:
        texts = [document.text for document in documents]
        masks = [np.zeros(0, np.bool_)]
        if self.template:
            found = [encode_parts(tokenizer, document.parts) for document in documents]
            ids = [np.array(each, np.int64) for each, _ in found]
            masks += [np.array(mask, np.bool_) for _, mask in found]
        else:
            ids = tokenizer.encode_documents(texts)
        return Encoded(
            np.concatenate([np.zeros(0, self.dtype), *(each.astype(self.dtype) for each in ids)]),
            np.concatenate(masks),
            np.array([len(each) for each in ids], np.int64),
            np.array([len(text.encode()) for text in texts], np.int64),
            keys(texts, self.dedup, self.similarity),
        )


@lru_cache(maxsize=1)
def _load(path: str, version: tuple[int, int], eos: str, special_tokens: bool) -> Tokenizer:
    tokenizer = load(path, eos)
    tokenizer.backend.encode_special_tokens = not special_tokens
    return tokenizer


def is_heldout(text: str, fraction: float) -> bool:
    """Whether a document is held out: by its content, so that copies of it are on the same side.

    >>> sum(is_heldout(str(i), 0.1) for i in range(1000))
    104
    """
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") < fraction * 2**64


def encode_all(work: Iterable[tuple[Encoder, Chunk]], workers: int) -> Iterator[tuple[Chunk, Result]]:
    """Encode every chunk by its encoder in ``workers`` processes; the results come in the order of ``work``."""
    if workers == 1:
        yield from ((chunk, encoder(chunk)) for encoder, chunk in work)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would copy the tokenizer library's threads in mid-air
    pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start)
    # Ctrl-C is for the main thread to answer: processes inherit the mask of the thread that starts them, by submitting
    deaf = ThreadPoolExecutor(1, initializer=signal.pthread_sigmask, initargs=(signal.SIG_BLOCK, {signal.SIGINT}))
    waiting: deque[tuple[Chunk, Future[Result]]] = deque()
    try:
        for encoder, chunk in work:
            waiting.append((chunk, deaf.submit(pool.submit, encoder, chunk).result()))
            if len(waiting) >= 3 * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()
    except BrokenProcessPool:
        raise ValueError(
            f"one of {workers} worker processes died, as when memory runs out; use fewer --workers, or smaller documents"
        ) from None
    finally:
        deaf.shutdown()
        pool.shutdown(cancel_futures=True)


def _start() -> None:
    """In a new process: one thread, and no life after the process that it works for, however that dies."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
