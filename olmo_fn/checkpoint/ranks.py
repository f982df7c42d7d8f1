"""The processes that save and load together, and how they speak: all tell rank 0 something, and it answers all."""

from __future__ import annotations

import pickle
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

from torch.distributed import Store

T = TypeVar("T")
A = TypeVar("A")


class RankLost(RuntimeError):
    """Another rank failed or does not answer, or the store does not; the message names it."""


class Message(NamedTuple):
    """What a rank says in an exchange: which one it is in, what it tells, and why it failed if it did."""

    label: str
    told: Any = None
    failure: str = ""


@dataclass(frozen=True)
class Ranks:
    """This process among those that save and load together; the default is one process alone.

    ``store`` is any ``torch.distributed.Store`` that all of them see, such as a TCPStore; it must be new for each start of
    the job (``PrefixStore(str(restart), store)`` makes it so). No process group is used, so that training may communicate
    meanwhile. A rank that does not answer for ``timeout`` seconds, when all others have, ends the save or load on all.

    >>> Ranks(2, 2)
    Traceback (most recent call last):
    ValueError: rank 2 of 2: must be 0 to 1
    """

    rank: int = 0
    size: int = 1
    store: Store | None = None
    timeout: float = 1800.0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} of {self.size}: must be 0 to {self.size - 1}")
        if self.size > 1 and self.store is None:
            raise ValueError(f"{self.size} ranks need a store that all see: give a torch.distributed.TCPStore")

    def connection(self) -> Ranks:
        """The same ranks with a connection to the store of their own, which no other thread's waiting blocks."""
        return replace(self, store=self.store.clone()) if self.store else self  # type: ignore[attr-defined]

    def exchange(
        self, label: str, work: Callable[[], T], combine: Callable[[list[A]], Any], tell: Callable[[T], A]
    ) -> tuple[T, Any]:
        """Do ``work`` on every rank and ``combine`` on rank 0; what this rank's work returned, and what ``combine`` did.

        ``combine`` gets ``tell(work())`` of all ranks, in their order; both return what pickle can send. All ranks make the
        same exchanges in the same order; rank 0 compares the labels. If one rank raises, all do: that one its own error, the
        others `RankLost` with the text of it.

        >>> Ranks().exchange("sizes", lambda: "abc", sum, tell=len)
        ('abc', 3)
        """
        if self.size == 1:
            own = work()
            return own, combine([tell(own)])
        number = self._ask("add", f"checkpoint/exchanges/{self.rank}", 1)
        key = f"checkpoint/{number}"
        if self.rank != 0:
            with self._sending_failures(f"{key}/{self.rank}", label):
                own = work()
                self._send(f"{key}/{self.rank}", Message(label, tell(own)))
            # Rank 0 waits for all, and then says which did not answer: give it the time to.
            answer = self._receive(key, 0, 2 * self.timeout)
            if answer.failure:
                raise RankLost(answer.failure)
            return own, answer.told
        with self._sending_failures(key, label):
            try:
                own = work()
            except Exception:
                self._gather(number)  # the others may still be at work, on files that rank 0 takes away when it fails
                raise
            result = combine(_told([Message(label, tell(own)), *self._gather(number)]))
            self._send(key, Message(label, result))
        return own, result

    def broadcast(self, label: str, work: Callable[[], T]) -> T:
        """What ``work`` returns on rank 0, on all; an `exchange` in which the others tell nothing."""
        result: T = self.exchange(label, lambda: None, lambda _: work(), tell=lambda _: None)[1]
        return result

    def _gather(self, number: int) -> list[Message]:
        """The messages of the ranks other than 0. When they are here, all have read the answer to the exchange before."""
        keys = {rank: f"checkpoint/{number}/{rank}" for rank in range(1, self.size)}
        messages = [self._receive(key, rank, self.timeout) for rank, key in keys.items()]
        for key in (*keys.values(), f"checkpoint/{number - 1}"):
            self._ask("delete_key", key)
        return messages

    @contextmanager
    def _sending_failures(self, key: str, label: str) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            cause = error.__cause__ or error
            reason = (cause.strerror if isinstance(cause, OSError) else "") or str(cause) or type(cause).__name__
            failure = str(error) if isinstance(error, RankLost) else f"rank {self.rank}: {reason}"
            with suppress(RankLost):
                self._send(key, Message(label, failure=failure))
            raise

    def _send(self, key: str, message: Message) -> None:
        self._ask("set", key, zlib.compress(pickle.dumps(message), 1))

    def _receive(self, key: str, rank: int, timeout: float) -> Message:
        end, pause = time.monotonic() + timeout, 0.001
        while not self._ask("check", [key]):  # the store's own waiting prints warnings, and cannot be interrupted
            if time.monotonic() > end:
                raise RankLost(f"rank {rank} did not answer within {timeout:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        message: Message = pickle.loads(zlib.decompress(self._ask("get", key)))
        return message

    def _ask(self, method: str, *args: Any) -> Any:
        try:
            return getattr(self.store, method)(*args)
        except RuntimeError as error:
            why = str(error).partition("\n")[0]
            raise RankLost(f"the store does not answer, so the rank that hosts it (usually rank 0) has ended: {why}") from error


SINGLE_PROCESS = Ranks()


def _told(messages: list[Message]) -> list[Any]:
    """What all ranks told; raises if one failed, and if they are not in the same exchange."""
    if failure := next((message.failure for message in messages if message.failure), ""):
        raise RankLost(failure)
    labels = [message.label for message in messages]
    if len(set(labels)) > 1:
        different = ", ".join(f"rank {labels.index(label)} at {label}" for label in dict.fromkeys(labels))
        raise ValueError(f"the ranks do not do the same: {different}; all must save the same ones in the same order")
    return [message.told for message in messages]
