"""Chunks of documents to token ids, in any number of processes, in the order of the chunks."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

import numpy as np

from olmo_fn.data.documents import Chunk, documents
from olmo_fn.data.tokenizer import Tokenizer, load


@dataclass(frozen=True)
class Tokens:
    """Token ids of some documents, each with its end-of-document token, and the UTF-8 bytes of their text."""

    ids: np.ndarray
    documents: int
    num_bytes: int


@dataclass(frozen=True)
class Job:
    """How to encode, in values that another process can be told."""

    tokenizer: str
    """Path of a tokenizer.json, never of another one than before."""
    eos: str
    field: str
    heldout: float
    dtype: str


def is_heldout(text: str, fraction: float) -> bool:
    """Whether a document is held out: by its content, so that copies of it are on the same side.

    >>> sum(is_heldout(str(i), 0.1) for i in range(1000))
    104
    """
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") < fraction * 2**64


def encode(job: Job, chunk: Chunk) -> tuple[Tokens, Tokens]:
    """The training and the held-out documents of ``chunk``."""
    sides: tuple[list[str], list[str]] = ([], [])
    for text in documents(chunk, job.field):
        sides[is_heldout(text, job.heldout)].append(text)
    train, heldout = (_tokens(_load(job.tokenizer, job.eos), texts, job.dtype) for texts in sides)
    return train, heldout


def encode_all(job: Job, chunks: Iterable[Chunk], workers: int) -> Iterator[tuple[Chunk, tuple[Tokens, Tokens]]]:
    """`encode` every chunk in ``workers`` processes; the results come in the order of ``chunks``."""
    if workers == 1:
        yield from ((chunk, encode(job, chunk)) for chunk in chunks)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would copy the tokenizer library's threads in mid-air
    pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_worker)
    # Ctrl-C is for the main thread to answer: processes inherit the mask of the thread that starts them, by submitting
    deaf = ThreadPoolExecutor(1, initializer=signal.pthread_sigmask, initargs=(signal.SIG_BLOCK, {signal.SIGINT}))
    waiting: deque[tuple[Chunk, Future[tuple[Tokens, Tokens]]]] = deque()
    try:
        for chunk in chunks:
            waiting.append((chunk, deaf.submit(pool.submit, encode, job, chunk).result()))
            if len(waiting) >= 3 * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()
    finally:
        deaf.shutdown()
        pool.shutdown(cancel_futures=True)


def _worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


@lru_cache(maxsize=1)
def _load(path: str, eos: str) -> Tokenizer:
    return load(path, eos)


def _tokens(tokenizer: Tokenizer, texts: list[str], dtype: str) -> Tokens:
    ids = [np.zeros(0, dtype), *(ids.astype(dtype) for ids in tokenizer.encode_documents(texts))]
    return Tokens(np.concatenate(ids), len(texts), sum(len(text.encode()) for text in texts))
