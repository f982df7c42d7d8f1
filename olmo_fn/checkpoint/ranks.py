"""The processes that save and load together: they speak through a store, and notice when one of them dies."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

from torch.distributed import HashStore, Store

_WORDS = ("hello", "go", "done", "verdict", "outcome")
# Rank 0 looks for lost ranks, the others for a verdict, this often; the beats come ten times in `Ranks.patience`.
_LOOK_SECONDS = 0.2


@dataclass(frozen=True)
class Ranks:
    """This process among those that save and load together; the default is one process alone.

    ``store`` is any ``torch.distributed.Store`` that all of them see, such as a TCPStore; it must be new for
    each start of the job (``PrefixStore(str(restart), store)`` makes it so). No process group is used, so
    training may communicate meanwhile. A rank that gives no sign of life for ``patience`` seconds is taken
    for dead, as is one that does not come to a save within six times as long.

    >>> Ranks(2, 2)
    Traceback (most recent call last):
    ValueError: rank 2 of 2: must be 0 to 1
    """

    rank: int = 0
    size: int = 1
    store: Store | None = None
    patience: float = 10.0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} of {self.size}: must be 0 to {self.size - 1}")
        if self.size > 1 and self.store is None:
            raise ValueError(f"{self.size} ranks need a store that all see: give a torch.distributed.TCPStore")

    def connection(self) -> Ranks:
        """The same with a connection to the store of its own, which no other thread's waiting blocks."""
        if self.store is None:
            return replace(self, store=HashStore())
        _ask(self.store, "check", ["checkpoint"])  # else connecting would wait for minutes for a dead host
        return replace(self, store=self.store.clone())  # type: ignore[attr-defined]


ALONE = Ranks()


class RankLost(RuntimeError):
    """A rank failed or died, or the store did; the message names it."""


@contextmanager
def beating(ranks: Ranks) -> Iterator[None]:
    """Tell the others all the while that this rank is alive."""
    if ranks.size == 1:
        yield
        return
    stop, store = threading.Event(), ranks.connection().store
    assert store is not None

    def beat() -> None:
        with suppress(RuntimeError):
            store.add(f"checkpoint/beat/{ranks.rank}", 1)
            while not stop.wait(ranks.patience / 10):
                store.add(f"checkpoint/beat/{ranks.rank}", 1)

    thread = threading.Thread(target=beat, name="checkpoint-beat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(ranks.patience)


class Meeting:
    """One save or load that all ranks take part in; the n-th of one rank meets the n-th of every other.

    As a context: whoever leaves it with an error makes all the others' calls raise `RankLost` with that error.
    Rank 0 watches all ranks, the others watch rank 0.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks if ranks.store else ranks.connection()
        self.seen = {rank: (0, time.monotonic()) for rank in (range(ranks.size) if ranks.rank == 0 else (0,))}
        self.looked = 0.0
        self.began = time.monotonic()

    def __enter__(self) -> Meeting:
        self.number = self._ask("add", f"checkpoint/meetings/{self.ranks.rank}", 1)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is not None:
            with suppress(RankLost):
                text = str(error) if isinstance(error, RankLost) else f"rank {self.ranks.rank}: {_reason(error)}"
                if not self._decide(f"failed {text}") and self.ranks.rank == 0:
                    self._set("outcome", f"failed {text}".encode())

    def gather(self, word: str, data: bytes = b"") -> list[bytes]:
        """What all ranks give, by rank, on rank 0; nothing on the others, which do not wait."""
        self._set(f"{word}/{self.ranks.rank}", data)
        if self.ranks.rank != 0:
            return []
        answers = [self._wait(f"{word}/{rank}", rank) for rank in range(self.ranks.size)]
        if word == "hello":
            self._forget(self.number - 1)
        return answers

    def broadcast(self, word: str, data: bytes = b"") -> bytes:
        """What rank 0 gives, on all ranks."""
        if self.ranks.rank == 0:
            self._set(word, data)
            return data
        return self._wait(word, 0)

    def conclude(self) -> None:
        """Raise `RankLost` if a rank has failed; after this none can make the meeting fail but rank 0, which calls it."""
        if not self._decide("concluded"):
            self.look_now()

    def look(self) -> None:
        """`look_now`, but not so soon after the last time: cheap to call often."""
        if time.monotonic() - self.looked >= _LOOK_SECONDS:
            self.look_now()

    def look_now(self) -> None:
        """Raise `RankLost` if the meeting has failed or a rank gives no sign of life."""
        if self.ranks.size == 1:
            return
        self.looked = now = time.monotonic()
        for word in ("verdict", "outcome"):
            if self._there(word) and (text := self._ask("get", self._key(word)).decode()).startswith("failed "):
                raise RankLost(text.removeprefix("failed "))
        for rank, (count, since) in self.seen.items():
            beats = self._ask("add", f"checkpoint/beat/{rank}", 0)
            if beats != count:
                self.seen[rank] = (beats, time.monotonic())
            elif beats and rank != self.ranks.rank and now - since > self.ranks.patience:
                raise RankLost(f"rank {rank} gave no sign of life for {self.ranks.patience:.0f} s")

    def _decide(self, verdict: str) -> bool:
        return bool(self._ask("compare_set", self._key("verdict"), "", verdict) == verdict.encode())

    def _wait(self, word: str, rank: int) -> bytes:
        pause = 0.002
        while not self._there(word):
            self.look()
            late = time.monotonic() - self.began > 6 * self.ranks.patience
            if late and not self._there(f"hello/{rank}"):
                raise RankLost(f"rank {rank} did not come within {6 * self.ranks.patience:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        return bytes(self._ask("get", self._key(word)))

    def _there(self, word: str) -> bool:
        return bool(self._ask("check", [self._key(word)]))

    def _set(self, word: str, data: bytes) -> None:
        self._ask("set", self._key(word), data)

    def _key(self, word: str, number: int | None = None) -> str:
        return f"checkpoint/{self.number if number is None else number}/{word}"

    def _forget(self, number: int) -> None:
        for word in _WORDS:
            for key in (word, *(f"{word}/{rank}" for rank in range(self.ranks.size) if word in ("hello", "done"))):
                self._ask("delete_key", self._key(key, number))

    def _ask(self, method: str, *args: Any) -> Any:
        return _ask(self.ranks.store, method, *args)


def _ask(store: Store | None, method: str, *args: Any) -> Any:
    try:
        return getattr(store, method)(*args)
    except RuntimeError as error:
        what = str(error).partition("\n")[0]
        raise RankLost(f"the store does not answer, so the rank that hosts it (usually rank 0) has ended: {what}") from error


def _reason(error: BaseException) -> str:
    error = error.__cause__ or error
    return (error.strerror if isinstance(error, OSError) else "") or str(error) or type(error).__name__
