"""The loop of a run: state, batch → state, and an event for what happens, until the steps are done or somebody says stop."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any

import torch

from olmo_fn.checkpoint import SaveFailed
from olmo_fn.core.step import State
from olmo_fn.data.prefetch import arriving
from olmo_fn.data.source import HELDOUT
from olmo_fn.mesh.mesh import describe
from olmo_fn.train import machine
from olmo_fn.train.check_attention import check_attention
from olmo_fn.train.config import Config
from olmo_fn.train.evals import Heldout
from olmo_fn.train.events import Evaluated, Event, Failure, Observer, RunInfo, Said, Started, Stepped, Stopped
from olmo_fn.train.export import Exporter
from olmo_fn.train.loads import with_loads
from olmo_fn.train.meter import InFlight, Meter, Moment
from olmo_fn.train.neighbours import Neighbours
from olmo_fn.train.observers import Console, Jsonl, build_observers, close_observers, fan_out
from olmo_fn.train.observers.divergence import streak
from olmo_fn.train.process import join
from olmo_fn.train.saving import Keeper
from olmo_fn.train.schedule import sizes
from olmo_fn.train.session import Session, open_run

OBSERVER, FAILURE, SIGNAL = 1, 2, 128
"""Codes of a stop: an observer asks for it, something failed, and above 128 a signal. The largest wins."""
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""The signals that end a run in order: of a terminal, or a cluster before its limit."""
NOT_FINITE = 30
"""Steps in a row without a finite loss that end a run; two at its end make it a failure."""
LOST = "the checkpoints from before are kept; lower --optim.lr, and begin from one with --run.start-from"


@dataclass
class Stop:
    """Set by a signal, after which a SIGINT interrupts at once, or by an observer. ``code`` 0: go on."""

    code: int = 0
    words: str = ""
    """What the observer said."""

    @property
    def reason(self) -> str:
        """Why the run stops; empty if it does not."""
        if self.code > SIGNAL:
            return signal.Signals(self.code - SIGNAL).name
        return (self.words or "another process asked for it") if self.code else ""

    def ask(self, words: str | None) -> None:
        """Stop for this reason, unless it is None or there is one already."""
        if words is not None and not self.code:
            self.code, self.words = FAILURE if isinstance(words, Failure) else OBSERVER, words

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        """Catch the signals inside the block, but for those that whoever started the process has it ignore (nohup)."""

        def catch(number: int, frame: FrameType | None) -> None:
            self.code = SIGNAL + number
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if number == signal.SIGINT:  # written past the buffers, which may be in use at this moment
                os.write(2, b"\nstopping after this step, with the state saved; Ctrl-C once more stops now\n")

        asked_for = (signal.SIGINT, signal.SIGTERM)
        heard = [n for n in STOPPING if n in asked_for or signal.getsignal(n) is not signal.SIG_IGN]
        before = {number: signal.signal(number, catch) for number in heard}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)


@dataclass(frozen=True)
class Result:
    """How a run ended: after which step, with which loss on held-out text, and who or what stopped it before its end."""

    session: Session = field(repr=False)
    step: int
    heldout: Heldout | None
    stopped_by: int
    """`OBSERVER`, `FAILURE`, or `SIGNAL` and the signal's number; 0 when the steps are done."""
    reason: str
    """The signal's name, or the observer's words."""

    @property
    def exit_code(self) -> int:
        """128 + n after signal n, 1 after a failure, else 0: what an observer asks for is an end like another."""
        return {OBSERVER: 0, FAILURE: 1}.get(self.stopped_by, self.stopped_by)


def train(run: Config | Session, observers: Sequence[Observer] = ()) -> Result:
    """Train to the end, going on from the newest whole checkpoint of the run's folder if there is one.

    Every process of a job calls it. On the main one the console, ``metrics.jsonl``, those that the config asks for, and
    ``observers`` get the events, and are closed at the end; one that answers with a text stops the run.
    """
    if isinstance(run, Config):
        with join(run) as context:
            return train(open_run(run.on(context.process.size), context), observers)
    if run.cfg.run.threads:
        torch.set_num_threads(run.cfg.run.threads)
    stop, heldout, ended = Stop(), None, Stopped(0)
    with ExitStack() as stack:
        all_observers = list(observers) if run.process.is_main else []
        stack.callback(lambda: close_observers(all_observers))
        for event in stack.enter_context(closing(events(run, stop))):
            if isinstance(event, Started) and run.process.is_main:  # nothing refuses the run from here on
                info = RunInfo(run.folder, run.folder.name, asdict(run.cfg))
                asked_for = build_observers(run.cfg.observe, info)
                exporters = [Exporter(run)] if run.cfg.export.hf_every else []
                always = Console(run.cfg.run.log_every), Jsonl(run.folder / "metrics.jsonl")
                all_observers[:0] = [*always, *asked_for, *exporters]
            stop.ask(fan_out(all_observers, event))
            match event:
                case Stepped(step):
                    run.process.step_done(step)
                case Evaluated(name=name, values=values) if name == HELDOUT:
                    heldout = Heldout(values["loss"], int(values["tokens"]), values.get("bits_per_byte"))
                case Stopped():
                    ended = event
    return Result(run, ended.step, heldout, stop.code if ended.reason else 0, ended.reason)


def events(session: Session, stop: Stop) -> Generator[Event]:
    """Run the steps that are left. Metrics come out a step late, and before whatever else looks at the state.

    All processes have the same events, but for the time of a `Saved`; a `Stop` of any of them ends all after the same step.
    What fails before it writes into the state, such as data that is gone, costs no step that is done: it is saved first.
    """
    run, context = session.cfg.run, session.process
    check_attention(session.cfg, context.device, session.dtype)
    if session.cfg.recipe.capture and context.device.type != "cuda":
        raise ValueError(
            f"--recipe.capture makes a CUDA graph of a step, and this trains on the {context.device.type}; leave it out"
        )
    _ = session.step, session.source  # what cannot be is refused before anything is written
    stopped, queue = 0, deque[InFlight]()  # the code that all processes have agreed on; steps whose metrics are not out
    lost = unlabeled = 0  # steps in a row without a finite loss; steps without a label

    def told(keep: int) -> Iterator[Event]:
        """The metrics of all steps but the last so many."""
        nonlocal stopped, lost, unlabeled
        while len(queue) > keep:
            arrived = queue.popleft()
            values, code = arrived.arrive()
            stopped = max(stopped, code)
            lost = streak(lost, values["loss"])
            if lost == NOT_FINITE or (lost > 1 and arrived.step == run.steps):
                stop.ask(Failure(f"the loss is not finite since step {arrived.step - lost + 1}; {LOST}"))
            values = with_source_losses(values, session.reported_sources)
            values = with_loads(values, every_layer=due(arrived.step, run.steps, max(1, run.steps // 100)))
            yield Stepped(arrived.step, meter.metrics(arrived.step, values, arrived.done))
            if values["loss"] == 0 and values["skipped"]:
                unlabeled += 1
                if unlabeled == 1:
                    yield Said(
                        f"no token of the batch of step {arrived.step} has a label{masks(session)}: nothing is learned from it"
                    )

    def asked() -> bool:
        """Whether any process is to stop; all know it then."""
        stop.code = context.all_reduce_max(stop.code)
        return stop.code > 0

    with ExitStack() as stack:
        keeper = Keeper(session, stack)
        state, checkpoint, new_slots = session.resume()
        start = n = int(state.step)
        notes = processes(session)
        keeper.begin(n, checkpoint)
        stack.enter_context(stop.listening())
        batches = stack.enter_context(closing(arriving(session.rows, start, run.steps, context.device)))
        yield Started(start, run.steps, checkpoint)
        if checkpoint:
            lacks = f", which has no {', '.join(new_slots)}: begun anew" if new_slots else ""
            yield Said(f"going on from {checkpoint}{lacks}")
        yield from map(Said, (*notes, *keeper.notes))
        rate = machine.gemm_rate(context.device, session.dtype) * context.process.size
        scheduled = machine.on_schedule(context.device, context.process.size)
        warm = stack.enter_context(machine.warm_up(scheduled))
        neighbours = Neighbours()
        stack.callback(neighbours.close)
        peak = machine.peak_rate(context.device) * context.process.size
        meter = Meter(session.cfg.model, sizes(session.cfg), context.device, rate, Moment(context.device), peak=peak)
        try:
            for batch in batches:
                state, metrics = session.step(state, batch)
                n += 1
                neighbours()
                queue.append(InFlight(n, metrics, stop.code, context))
                if n == start + 1:
                    warm()
                elif scheduled:
                    machine.collect(n)
                save = due(n, run.steps, run.checkpoint_every, session.cfg.export.hf_every)
                evaluate = due(n, run.steps, run.eval_every)
                yield from told(keep=1)
                if save or evaluate or stopped or (stop.code and not context.connection):
                    yield from told(keep=0)
                if keeper.saver.is_done or save or stopped:
                    yield from keeper.collect()
                if (save or stopped) and lost < NOT_FINITE:
                    keeper.submit(state, n, keep_all=lost > 0)
                if stopped:
                    break
                if evaluate and n < run.steps:
                    yield from evaluated(session, state, asked)
                    meter.before = Moment(context.device)
                    if stop.code:
                        keeper.submit(state, n, keep_all=lost > 0)
                        break
        except Exception as error:
            if context.connection or isinstance(error, SaveFailed) or hasattr(state.step, "spent"):
                raise  # of a state that is spent the update may have written a part over
            yield from told(keep=0)
            yield from keeper.collect()
            keeper.submit(state, n, keep_all=True)
            yield from keeper.collect(last=True)
            if not stop.code:  # else it may well be for the signal that something failed
                yield Said(f"the state after step {n} is saved")
                raise
        yield from keeper.collect(last=True)
        if not asked():
            yield from evaluated(session, state, asked)
    yield Stopped(n, stop.reason)


def with_source_losses(values: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The metrics with the loss a token of each source that the step saw, as ``loss/NAME``, for the sums by source.

    >>> with_source_losses({"loss": 2.0, "source_ce": [3.0, 0.0], "source_tokens": [2.0, 0.0]}, ["web", "code"])
    {'loss': 2.0, 'loss/web': 1.5}
    """
    sums, tokens = (values.get(name, []) for name in ("source_ce", "source_tokens"))
    found = {f"loss/{name}": ce / n for name, ce, n in zip(names, sums, tokens, strict=False) if n}
    return {name: value for name, value in values.items() if not name.startswith("source_")} | found


def due(step: int, last: int, *every: int) -> bool:
    """Whether something is done after ``step``: after the last one, and after each multiple of ``every`` that is not 0."""
    return step == last or any(n and step % n == 0 for n in every)


def evaluated(session: Session, state: State, given_up: Callable[[], bool]) -> Iterator[Event]:
    """Evaluate on each set of held-out tokens, until it is given up."""
    for name, tokens in session.source.heldout.items():
        if (count := min(len(tokens), session.cfg.run.eval_tokens)) and not given_up():
            words = "held-out tokens" if name == HELDOUT else f"tokens of {name}"
            yield Said(f"evaluating on {count:,} {words}")
            if found := session.evaluate(state, name=name, given_up=given_up):
                values = {name: value for name, value in found._asdict().items() if value is not None}
                yield Evaluated(int(state.step), name, values)
            elif not given_up():
                yield Said("none of them is predicted, so there is no loss")


def masks(session: Session) -> str:
    """What hides labels, in words."""
    paths = session.cfg.data.label_mask_paths
    return f" (--data.label-mask-paths {' '.join(paths)})" if paths else ""


def processes(session: Session) -> list[str]:
    """What there is to say of the processes, if there are several."""
    context = session.process
    return [f"{context.process.size} processes: {describe(context.connection.mesh)}"] if context.connection else []
