"""Chunks of documents to token ids, in any number of processes, in the order of the chunks."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from olmo_fn.data.documents import Chunk, documents
from olmo_fn.data.tokenizer import load


class Encoded(NamedTuple):
    """Token ids of some documents, each with its end-of-document token, and the UTF-8 bytes of their text."""

    ids: np.ndarray
    documents: int
    num_bytes: int
    skipped: int = 0
    """Documents without a text, which were passed over; all count for the training side."""


@dataclass(frozen=True)
class Encoder:
    """How to encode, in values that another process can be told."""

    tokenizer: str
    """Path of a tokenizer.json, never of another one than before."""
    eos: str
    field: str
    heldout: float
    """Part of the documents to hold out, from 0 to 1."""
    dtype: str
    skip_missing: bool = False

    def __call__(self, chunk: Chunk) -> tuple[Encoded, Encoded]:
        """The training and the held-out documents of ``chunk``."""
        tokenizer = _load(self.tokenizer, self.eos)
        sides: tuple[list[str], list[str]] = ([], [])
        skipped = 0
        for text in documents(chunk, self.field, self.skip_missing):
            if text is None:
                skipped += 1
            else:
                sides[is_heldout(text, self.heldout)].append(text)

        def encoded(texts: list[str]) -> Encoded:
            ids = [np.zeros(0, self.dtype), *(ids.astype(self.dtype) for ids in tokenizer.encode_documents(texts))]
            return Encoded(np.concatenate(ids), len(texts), sum(len(text.encode()) for text in texts))

        return encoded(sides[0])._replace(skipped=skipped), encoded(sides[1])


_load = lru_cache(maxsize=1)(load)


def is_heldout(text: str, fraction: float) -> bool:
    """Whether a document is held out: by its content, so that copies of it are on the same side.

    >>> sum(is_heldout(str(i), 0.1) for i in range(1000))
    104
    """
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") < fraction * 2**64


def encode_all(work: Iterable[tuple[Encoder, Chunk]], workers: int) -> Iterator[tuple[Chunk, tuple[Encoded, Encoded]]]:
    """Encode every chunk by its encoder in ``workers`` processes; the results come in the order of ``work``."""
    if workers == 1:
        yield from ((chunk, encoder(chunk)) for encoder, chunk in work)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would copy the tokenizer library's threads in mid-air
    pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_one_thread)
    # Ctrl-C is for the main thread to answer: processes inherit the mask of the thread that starts them, by submitting
    deaf = ThreadPoolExecutor(1, initializer=signal.pthread_sigmask, initargs=(signal.SIG_BLOCK, {signal.SIGINT}))
    waiting: deque[tuple[Chunk, Future[tuple[Encoded, Encoded]]]] = deque()
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


def _one_thread() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
