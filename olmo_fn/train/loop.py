"""The loop of a run: state, batch → state, until the steps are done or somebody says stop."""

from __future__ import annotations

import signal
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from olmo_fn import tree
from olmo_fn.checkpoint import Index, Retention, Saver, load, load_newest, read_index
from olmo_fn.core.compile import prepare_cache
from olmo_fn.core.step import State, Step
from olmo_fn.data.config import cache_dir
from olmo_fn.data.prefetch import prefetch
from olmo_fn.data.resized import Resized
from olmo_fn.data.source import Source, heldout_batches, open_data
from olmo_fn.launch.monitor import watch
from olmo_fn.launch.process import agree
from olmo_fn.mesh.mesh import describe
from olmo_fn.models import transformer
from olmo_fn.models.count import flops_per_token
from olmo_fn.planner.fit import check_memory
from olmo_fn.spec import abstract
from olmo_fn.train import machine
from olmo_fn.train.config import Config
from olmo_fn.train.evals import Heldout, evaluate
from olmo_fn.train.folder import check_folder, write_config
from olmo_fn.train.job import Job, join
from olmo_fn.train.metrics import MetricsFile
from olmo_fn.train.progress import Progress
from olmo_fn.train.recipe import first_parameters, model_parameters, parameters, recipe
from olmo_fn.train.schedule import sizes


@dataclass
class Stop:
    """Set by SIGINT or SIGTERM; a second SIGINT interrupts at once."""

    signal: int = 0

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        """Catch the signals inside the block."""

        def catch(number: int, frame: FrameType | None) -> None:
            self.signal = number
            signal.signal(signal.SIGINT, signal.default_int_handler)

        before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass(frozen=True)
class Result:
    """How a run ended: its state, where it is, and the number of the signal that stopped it, or 0."""

    state: State = field(repr=False)
    source: Source = field(repr=False)
    folder: Path
    heldout: Heldout | None
    stopped_by: int
    leads: bool = True
    """Whether this process is the one that reports."""


def train(cfg: Config) -> Result:
    """Train ``cfg`` to its end, going on from the newest whole checkpoint of its folder if there is one.

    Every process of a job calls it; `Result.leads` is true on the one that has something to say.
    """
    if cfg.run.threads:
        torch.set_num_threads(cfg.run.threads)
    with join(cfg) as job, watch(job.process) as beat:
        return _train(cfg, job, beat)


def _train(cfg: Config, job: Job, beat: Callable[[int], None]) -> Result:
    device, dtype = job.device, machine.compute_dtype(cfg.recipe.dtype, job.device)
    step = recipe(cfg, dtype, job.connection)  # a wrong recipe is refused here, before anything is read or written
    check_memory(cfg, cfg.mesh.on(job.process.size), str(dtype).removeprefix("torch."), machine.total_memory(device))
    steps = sizes(cfg)
    opened = partial(open_data, cfg.data, cfg.model.vocab_size, cfg.recipe.sequence_length, steps.largest)
    source = job.first(lambda: opened(show=job.leads))
    agree(fingerprint(source), "data", job.process)
    check_folder(cfg)
    state, found, new = first_state(cfg, step, job)  # all ranks have looked at the folder when this returns
    folder = Path(cfg.run.folder)
    compiled = cache_dir(cfg.data) / "compiled"
    broken = job.first(lambda: prepare_cache(compiled, sweep=job.process.local_rank == 0))
    if job.leads:
        write_config(cfg, folder)
        if source.tokenizer:
            source.tokenizer.save(folder / "tokenizer.json")
    job.wait()
    start = int(state.step)
    retention = Retention(keep_last=cfg.run.keep_last or None, keep_every=cfg.run.keep_every or None)
    with ExitStack() as stack:
        stop = stack.enter_context(Stop().listening())
        saver = stack.enter_context(Saver(folder / "checkpoints", retention=retention, ranks=job.ranks))
        lines = stack.enter_context(MetricsFile(folder / "metrics.jsonl", start) if job.leads else nullcontext())
        progress = stack.enter_context(Progress(cfg.run.steps, start, cfg.run.log_every, quiet=not job.leads))
        if broken:
            progress.say(f"dropped {len(broken)} files that a killed compilation left broken")
        if found:
            progress.say(f"going on from {found}" + (f", which has no {', '.join(new)}: begun anew" if new else ""))
        if job.connection:
            progress.say(f"{job.process.size} processes: {describe(job.connection.mesh)}")
        meter = Meter(cfg, machine.gemm_rate(device, dtype) * job.process.size, device)
        batches = prefetch(Resized(source.train, steps), start, cfg.run.steps)
        stack.callback(batches.close)  # type: ignore[attr-defined]
        warm = stack.enter_context(machine.warm_up())
        for batch in batches:
            state, metrics = step(state, {name: value.to(device) for name, value in batch.items()})
            line = meter.read(int(state.step), metrics)
            if lines:
                lines.write(line)
            progress.show(line)
            done = line["step"]
            beat(done)
            if done == start + 1:
                warm()
            stopped = job.largest(stop.signal)  # a signal reaches the ranks at different steps
            last = done == cfg.run.steps or stopped != 0
            if last or (cfg.run.checkpoint_every and done % cfg.run.checkpoint_every == 0):
                saver.submit(as_tree(state), step=done, meta={"tokens": meter.tokens(done)})
            if stopped:
                break
            if not last and cfg.run.eval_every and done % cfg.run.eval_every == 0:
                with meter.paused():
                    heldout(cfg, step, state, source, dtype, progress)
        saver.wait()
        result = heldout(cfg, step, state, source, dtype, progress) if not job.largest(stop.signal) else None
    return Result(state, source, folder, result, job.largest(stop.signal), job.leads)


def fingerprint(source: Source) -> str:
    """What two processes with the same data agree on, as text."""
    first = source.train(0)
    parts = {name: f"{zlib.crc32(x.numpy().tobytes()):08x}" for name, x in first.items() if x.ndim}
    return f"{len(source.heldout)} held-out tokens\nfirst batch {parts}"


def as_tree(state: State) -> tree.Tree:
    """The state as one tree, as checkpoints hold it."""
    return {"step": state.step, "params": state.params, "slots": state.slots}


def first_state(cfg: Config, step: Step, job: Job) -> tuple[State, Path | None, list[str]]:
    """The state to go on from, the checkpoint it is from, and slots it did not have; or a new one, None, and nothing."""
    whole = abstract_state(cfg, step)

    def read(path: Path) -> tree.Tree:
        like, select = what_it_has(whole, read_index(path), part=cfg.mesh.pp > 1)
        return load(path, like, select=select, device=job.device)[0]

    def read_params(path: Path) -> tree.Tree:
        return load(path, {"params": abstract(transformer.specs(cfg.model))}, select=["params.*"], device=job.device)[0]

    found = load_newest(Path(cfg.run.folder) / "checkpoints", read, ranks=job.ranks)
    anew = cfg.run.start_with == "params" or cfg.lora.rank > 0
    if found is None and cfg.run.start_from:
        source = Path(cfg.run.start_from)
        if (source / "checkpoints").is_dir():
            found = load_newest(source / "checkpoints", read_params if anew else read, ranks=job.ranks)
        elif source.is_dir():
            found = source, (read_params if anew else read)(source)
        if found is None:
            raise ValueError(f"--run.start-from {str(source)!r}: there is no whole checkpoint")
        if anew:
            return step.init({**first_parameters(cfg, step, job.device), **found[1]["params"]}), found[0], []
    if found is None:
        return step.init(first_parameters(cfg, step, job.device)), None, []
    path, loaded = found
    state = State(loaded["step"], loaded["params"], loaded["slots"])
    new = [name for name in whole["slots"] if name not in state.slots]
    return with_new_slots(step, state, new), path, new


def what_it_has(whole: tree.Tree, index: Index, part: bool = False) -> tuple[tree.Tree, list[str]]:
    """Of a state as it should be, what a checkpoint has; and the paths to load, those of ``whole`` only where that is a part.

    Slots of parameters that are frozen by now are not loaded.
    """
    like = {**whole, "slots": {name: slot for name, slot in whole["slots"].items() if name in slots_of(index)}}
    params = dict(tree.items(whole["params"]))
    moving = {path for slot in whole["slots"].values() for path, _ in tree.items(slot) if path in params}
    frozen = params.keys() - moving if moving else set()
    left = {name for name in index.tensors if name.startswith("slots.") and name.split(".", 2)[-1] in frozen}
    names = tree.flatten(like) if part else index.tensors
    return like, [*(name for name in names if name not in left), *index.empty]


def slots_of(index: Index) -> set[str]:
    """The names of the slots in a checkpoint."""
    return {path.split(".")[1] for path in (*index.tensors, *index.empty) if path.startswith("slots.")}


def with_new_slots(step: Step, state: State, new: list[str]) -> State:
    """The state with what the step's transforms remember and it has not, the slots ``new``, begun anew from its parameters.

    So a transform can be added to a run at any time: `ema` starts at the parameters of that step.
    """
    fresh = step.init(state.params).slots if new else {}
    return state._replace(slots={**state.slots, **{name: fresh[name] for name in new}})


def abstract_state(cfg: Config, step: Step) -> tree.Tree:
    """The state's names, shapes and dtypes on the meta device."""
    return as_tree(step.init(abstract(parameters(cfg))))


class Meter:
    """Turns a step's metrics into a line of numbers, with the speed since the last one."""

    def __init__(self, cfg: Config, rate: float, device: torch.device) -> None:
        self.sizes, self.model = sizes(cfg), cfg.model
        self.rate, self.device = rate, device
        self.last = time.perf_counter()

    def tokens(self, step: int) -> int:
        """Tokens seen after ``step`` steps."""
        return self.sizes.tokens_before(step)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside the block does not count as training time."""
        start = time.perf_counter()
        yield
        self.last += time.perf_counter() - start

    def read(self, step: int, metrics: dict[str, torch.Tensor]) -> dict[str, Any]:
        """The line of ``metrics.jsonl`` of this step."""
        values = {name: float(value) for name, value in metrics.items()}
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        speed = (self.tokens(step) - self.tokens(step - 1)) / seconds
        flops = flops_per_token(self.model, self.sizes.at(step - 1).sequence_length)
        return {
            "step": step,
            **values,
            "tokens": self.tokens(step),
            "seconds": round(seconds, 4),
            "tokens_per_s": round(speed, 1),
            "mfu": round(speed * flops / self.rate, 4),
            "peak_mb": round(machine.peak_memory(self.device) / 1e6, 1),
        }


def heldout(cfg: Config, step: Step, state: State, source: Source, dtype: torch.dtype, progress: Progress) -> Heldout | None:
    """Evaluate on the held-out tokens, at most ``run.eval_tokens`` of them, and say so; None when nothing is held out."""
    tokens = source.heldout[: cfg.run.eval_tokens]
    if not len(tokens):
        return None
    progress.say(f"evaluating on {len(tokens):,} held-out tokens")
    T = cfg.recipe.sequence_length
    rows = max(1, cfg.recipe.batch_size // cfg.recipe.accumulate)
    batches = heldout_batches(replace(source, heldout=tokens), T, max(1, T // 2), rows)
    num_bytes = source.tokenizer.count_bytes(tokens) if source.tokenizer else None
    loss = transformer.loss(cfg.model)
    params = model_parameters(cfg, state.params)
    found = evaluate(loss, params, batches, num_bytes, dtype=dtype, execution=step.execution)
    bits = f", {found.bits_per_byte:.4f} bits per byte" if found.bits_per_byte else ""
    progress.say(f"held-out after step {int(state.step)}: loss {found.loss:.4f}{bits} ({found.tokens:,} tokens)")
    return found
