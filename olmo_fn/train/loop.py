"""The loop of a run: state, batch → state, and an event for what happens, until the steps are done or somebody says stop."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

import torch

from olmo_fn.checkpoint import Retention, Saver
from olmo_fn.core.step import State
from olmo_fn.data.prefetch import prefetch
from olmo_fn.data.source import HELDOUT
from olmo_fn.mesh.mesh import describe
from olmo_fn.train import machine
from olmo_fn.train.config import Config
from olmo_fn.train.evals import Heldout
from olmo_fn.train.events import Evaluated, Event, Observer, RunInfo, Said, Saved, Started, Stepped, Stopped
from olmo_fn.train.folder import check_folder, write_config
from olmo_fn.train.meter import InFlight, Meter, Moment
from olmo_fn.train.observers import Console, Jsonl, build_observers, close_observers, fan_out
from olmo_fn.train.process import join
from olmo_fn.train.schedule import sizes
from olmo_fn.train.session import Session, as_tree, open_run

OBSERVER = 1
"""Code of a stop that an observer asks for; below the numbers of SIGINT and SIGTERM, which win."""


@dataclass
class Stop:
    """Set by SIGINT or SIGTERM, of which a second SIGINT interrupts at once, or by an observer. ``code`` 0: go on."""

    code: int = 0
    words: str = ""
    """What the observer said."""

    @property
    def reason(self) -> str:
        """Why the run stops; empty if it does not."""
        if self.code == OBSERVER:
            return self.words or "another process asked for it"
        return signal.Signals(self.code).name if self.code else ""

    def ask(self, words: str | None) -> None:
        """Stop for this reason, unless it is None or there is one already."""
        if words is not None and not self.code:
            self.code, self.words = OBSERVER, words

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        """Catch the signals inside the block."""

        def catch(number: int, frame: FrameType | None) -> None:
            self.code = number
            signal.signal(signal.SIGINT, signal.default_int_handler)

        before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass(frozen=True)
class Result:
    """How a run ended: after which step, with which loss on held-out text, and who or what stopped it before its end."""

    session: Session = field(repr=False)
    step: int
    heldout: Heldout | None
    stopped_by: int
    """Number of the signal, or `OBSERVER`; 0 when the steps are done."""
    reason: str
    """The signal's name, or the observer's words."""

    @property
    def exit_code(self) -> int:
        """128 + n after signal n, else 0: what an observer asks for is an end like another."""
        return 128 + self.stopped_by if self.stopped_by > OBSERVER else 0


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
                all_observers[:0] = [Console(run.cfg.run.log_every), Jsonl(run.folder / "metrics.jsonl"), *asked_for]
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
    """
    run, context = session.cfg.run, session.process
    _ = session.step, session.source  # what cannot be is refused before anything is written
    check_folder(session.cfg)
    state, checkpoint, new_slots = session.resume()
    notes = prepare_folder(session)
    start = n = int(state.step)
    stopped, queue = 0, deque[InFlight]()  # the code that all processes have agreed on; steps whose metrics are not out
    with ExitStack() as stack:
        stack.enter_context(stop.listening())
        retention = Retention(keep_last=run.keep_last or None, keep_every=run.keep_every or None)
        saver = stack.enter_context(Saver(session.folder / "checkpoints", retention=retention, ranks=context.ranks))
        batches = stack.enter_context(closing(prefetch(session.batch, start, run.steps)))
        yield Started(start, run.steps, checkpoint)
        if checkpoint:
            lacks = f", which has no {', '.join(new_slots)}: begun anew" if new_slots else ""
            yield Said(f"going on from {checkpoint}{lacks}")
        yield from map(Said, notes)
        rate = machine.gemm_rate(context.device, session.dtype) * context.process.size
        warm = stack.enter_context(machine.warm_up())
        meter = Meter(session.cfg.model, sizes(session.cfg), context.device, rate, Moment(context.device))
        for batch in batches:
            state, metrics = session.step(state, batch)
            n += 1
            queue.append(InFlight(n, metrics, stop.code, context))
            if n == start + 1:
                warm()
            save, evaluate = (n == run.steps or (every and n % every == 0) for every in (run.checkpoint_every, run.eval_every))
            while queue and (len(queue) > 1 or save or evaluate or stopped or (stop.code and not context.connection)):
                arrived = queue.popleft()
                values, code = arrived.arrive()
                stopped = max(stopped, code)
                yield Stepped(arrived.step, meter.metrics(arrived.step, values, arrived.done))
            if saver.is_done or save or stopped:
                yield from saved(saver.settle())
            if save or stopped:
                saver.submit(as_tree(state), step=n, meta={"tokens": meter.sizes.tokens_before(n)})
            if stopped:
                break
            if evaluate and n < run.steps:
                yield from evaluated(session, state)
                meter.before = Moment(context.device)
        yield from saved(saver.wait())
        stop.code = context.all_reduce_max(stopped or stop.code)
        if not stop.code:
            yield from evaluated(session, state)
    yield Stopped(n, stop.reason)


def saved(path: Path | None) -> Iterator[Event]:
    """Say that a checkpoint is committed, if one is."""
    if path:
        yield Saved(int(path.name.removeprefix("step")), path)


def evaluated(session: Session, state: State) -> Iterator[Event]:
    """Evaluate on each set of held-out tokens."""
    for name, tokens in session.source.heldout.items():
        if count := min(len(tokens), session.cfg.run.eval_tokens):
            words = "held-out tokens" if name == HELDOUT else f"tokens of {name}"
            yield Said(f"evaluating on {count:,} {words}")
            if found := session.evaluate(state, name=name):
                values = {name: value for name, value in found._asdict().items() if value is not None}
                yield Evaluated(int(state.step), name, values)
            else:
                yield Said("none of them is predicted, so there is no loss")


def prepare_folder(session: Session) -> list[str]:
    """Write the config and the tokenizer into the run's folder; what there is to say."""
    context = session.process
    if context.is_main:
        write_config(session.cfg, session.folder)
        if session.source.tokenizer:
            session.source.tokenizer.save(session.folder / "tokenizer.json")
    context.barrier()
    return [f"{context.process.size} processes: {describe(context.connection.mesh)}"] if context.connection else []
