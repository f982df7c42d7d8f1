"""The sections of ``gpu.py``: what is checked and measured on a GPU. They run on a CPU too, at toy sizes."""

from __future__ import annotations

import gc
import json
import signal
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olmo_fn import tree
from olmo_fn.checkpoint import Saver, load
from olmo_fn.core.capture import capture
from olmo_fn.core.step import State, Step
from olmo_fn.data.settings import Data
from olmo_fn.kernels.attention_backend import AttentionBackend, need_of
from olmo_fn.kernels.attention_table import BACKENDS
from olmo_fn.models import transformer
from olmo_fn.models.config import GatedDelta, Model, MoE, PreNorm, dense, modified
from olmo_fn.models.count import flops_per_token
from olmo_fn.models.families import OLMO2
from olmo_fn.spec import Spec, init
from olmo_fn.testing.recording import recorded_graphs
from olmo_fn.train.config import Config, Recipe, Run
from olmo_fn.train.optimizers import OPTIMIZERS, SGD, AdamW
from olmo_fn.train.recipe import recipe
from olmo_fn.train.schedules import Constant

PEAK = 989.4e12  # FLOP/s of dense bf16 products of an H100 or H200 SXM, by their data sheets


@dataclass
class Bench:
    """One run of this script: where it computes, when it must end, and what it has found."""

    device: torch.device
    fake: bool
    end: float
    out: Any
    expected: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def say(self, figure: str, value: Any, expected: Any = None, gate: str = "", passed: bool | None = None) -> None:
        """A figure; with a ``gate``, what must hold, and whether it does. On a CPU speeds are no figures, and have no gates."""
        row = {"section": self.section, "figure": figure, "value": value, "expected": expected, "gate": gate, "passed": passed}
        self.rows.append(row)
        print(json.dumps(row), file=self.out, flush=True)

    def speed(self, figure: str, value: float, at_least: float, unit: str) -> None:
        """A rate with a least value, which only a GPU has to reach."""
        self.say(f"{figure} ({unit})", round(value, 1), None, f">= {at_least:g}", None if self.fake else value >= at_least)

    def pick(self, real: Any, toy: Any) -> Any:
        """A size for a GPU, or for the logic alone."""
        return toy if self.fake else real

    section: str = ""

    def seconds(self, fn: Callable[[], Any], repeats: int = 20) -> float:
        """Median time of ``fn`` on the device, after three calls that are not counted."""
        repeats = self.pick(repeats, 2)
        for _ in range(3):
            fn()
        if self.device.type != "cuda":
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                fn()
                times.append(time.perf_counter() - start)
            return statistics.median(times)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        marks[0].record()
        for mark in marks[1:]:
            fn()
            mark.record()
        marks[-1].synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in pairwise(marks)) / 1e3


# --- what is run ------------------------------------------------------------------------------------------------------


def config(model: Model, rows: int, length: int, **more: Any) -> Config:
    """A step of ``rows`` sequences; ``optim`` apart, ``more`` is of the recipe."""
    optim = more.pop("optim", AdamW(lr=1e-4, moments="bfloat16"))
    return Config(model, optim=optim, schedule=Constant(warmup=0), recipe=Recipe(rows, length, **more), run=Run(steps=10_000))


def batch_of(cfg: Config, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """Random tokens, an eighth of whose labels are masked; documents of 48 tokens where the config keeps them apart."""
    generator = torch.Generator().manual_seed(seed)
    shape = cfg.recipe.batch_size, cfg.recipe.sequence_length
    ids, labels = (torch.randint(cfg.model.vocab_size, shape, generator=generator) for _ in range(2))
    labels[:, ::8] = -100
    batch = {"input_ids": ids, "labels": labels}
    if cfg.data.mask_documents:
        batch["documents"] = (torch.arange(shape[1]) // 48).expand(shape).contiguous()
    return {name: x.to(device) for name, x in batch.items()}


def random_state(step: Step, model: Model, device: torch.device) -> State:
    """A state whose weights are drawn on the device, of the usual size."""

    def draw(spec: Spec) -> Tensor:
        p = torch.empty(spec.shape, device=device)
        return p.normal_(0, 0.02) if p.ndim > 1 else p.fill_(1.0)

    return step.init(tree.map(draw, transformer.specs(model)))


def moved(cfg: Config, dtype: torch.dtype, device: torch.device, wide: bool = False) -> dict[str, Tensor]:
    """By how much one step of SGD at rate 1 moves each parameter: its gradient, as the whole step computes it."""
    params = init(transformer.specs(cfg.model), 0, torch.float64 if wide else torch.float32)
    step = recipe(cfg, dtype)
    before = tree.map(lambda p: p.clone().to(device), params)
    after, _ = step(step.init(tree.map(lambda p: p.to(device), params)), batch_of(cfg, device))
    return {path: (tree.at(before, path) - p).cpu().double() for path, p in tree.items(after.params)}


def distance(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The largest relative distance of a leaf, by norms."""
    return max(float((found[path] - g).norm() / g.norm().clamp(min=1e-30)) for path, g in exact.items())


# --- the sections -----------------------------------------------------------------------------------------------------


def card(b: Bench) -> None:
    """What it is, its memory's rate, and its products'."""
    cuda = b.device.type == "cuda"
    b.say("device", torch.cuda.get_device_name() if cuda else "cpu")
    b.say("torch", torch.__version__)
    b.say(
        "cuda, cudnn, nccl", [torch.version.cuda, torch.backends.cudnn.version(), torch.cuda.nccl.version() if cuda else None]
    )
    x = torch.empty(b.pick(1 << 30, 1 << 20), dtype=torch.uint8, device=b.device)
    y = torch.empty_like(x)
    b.speed("copy", 2 * x.nbytes / b.seconds(lambda: y.copy_(x)) / 1e12, 2.5, "TB/s")
    n = b.pick(8192, 256)
    p, q = (torch.randn(n, n, device=b.device, dtype=torch.bfloat16) for _ in range(2))
    for name, product in (("NN", lambda: p @ q), ("NT", lambda: p @ q.T), ("TN", lambda: p.T @ q)):
        b.speed(f"product {n}³ {name}", 2 * n**3 / b.seconds(product) / 1e12, 600, "TFLOP/s")


def parity(b: Bench) -> None:
    """Gradients of whole steps beside the CPU's in fp64, no farther than twice the CPU's own in that dtype; each optimizer."""
    small = dense(b.pick(256, 64), 2, 4, 512, vocab_size=b.pick(20_000, 512))  # of which a kernel keeps some in registers
    models = {
        "plain": small,
        "grouped": modified(small, n_kv_heads=2),
        "windowed": modified(small, window_pattern=(48, -1)),
        "documents": small,
        "experts": replace(small, block=replace(small.block, feed_forward=MoE(num_experts=4, top_k=4, expert_size=96))),
        "hybrid": replace(
            small, pattern=(PreNorm(mixer=GatedDelta(n_heads=4), feed_forward=small.block.feed_forward), small.block)
        ),
    }
    cpu = torch.device("cpu")
    for name, model in models.items():
        cfg = config(model, 2, 128, optim=SGD(lr=1.0, momentum=0.0, weight_decay=0.0), clip=0.0, skip_sigma=0.0, compile=False)
        cfg = replace(cfg, data=Data(mask_documents=name == "documents"))
        exact = moved(cfg, torch.float64, cpu, wide=True)
        for dtype in (torch.float32, torch.bfloat16):
            limit = 2 * distance(moved(cfg, dtype, cpu), exact)
            for how in ("eager", "compiled")[: b.pick(2, 1)]:
                found = distance(
                    moved(replace(cfg, recipe=replace(cfg.recipe, compile=how == "compiled")), dtype, b.device), exact
                )
                gate = f"<= {limit:.2g}, twice the CPU's"
                b.say(f"gradients {name} {str(dtype)[6:]} {how}", float(f"{found:.3g}"), None, gate, found <= limit)
    for kind in OPTIMIZERS:
        cfg = config(small, 2, 64, optim=kind(), compile=False)
        losses = []
        for device in (cpu, b.device):
            step = recipe(cfg, torch.float32)
            state = step.init(tree.map(lambda p, device=device: p.to(device), init(transformer.specs(small), 0)))
            for n in range(3):
                state, metrics = step(state, batch_of(cfg, device, n))
            losses.append(float(metrics["loss"]))
        b.say(f"loss after 3 steps of {kind.__name__}", losses[1], losses[0], "within 1e-3", abs(losses[1] - losses[0]) < 1e-3)


def attention(b: Bench) -> None:
    """Every backend that is there: time of both sweeps, FLOP/s without what is masked, and the error beside fp64."""
    best = {"forward": 0.0, "backward": 0.0}
    lengths, K = b.pick((4096, 8192), (256,)), 128
    for T in lengths:
        kinds = ("causal", None, 32, 32), ("window", T // 2, 32, 32), ("grouped", None, 40, 8), ("documents", None, 32, 32)
        for name, window, H, N in kinds:
            H, N = b.pick((H, N), (4, 2))
            documents = (torch.arange(T, device=b.device) // (T // 4))[None] if name == "documents" else None
            q, k, v, g = (
                torch.randn(1, T, heads, K, device=b.device, dtype=torch.bfloat16).transpose(1, 2) for heads in (H, N, N, H)
            )
            pairs = T * T / (8 if documents is not None else 2) if window is None else T * window - window * window / 2
            rows, given = slice(T - 64, T), {"window": window, "documents": documents}
            exact, _ = tiles()(q[:, :, rows].double(), k.double(), v.double(), offset=T - 64, **given)
            for backend in BACKENDS:
                if backend.lacks(need_of(q, k, **given)) or (backend.name == "tiles" and T > 4096):
                    continue
                out, pullback = backend(q, k, v, **given)
                error = float((out[:, :, rows].double() - exact).norm() / exact.norm())
                figure = f"{backend.name} {name} T {T}"
                b.say(f"{figure} error", float(f"{error:.2g}"), None, "<= 0.01", error <= 0.01)
                for way, flops, fn in (
                    ("forward", 4 * pairs * K * H, partial(backend, q, k, v, **given)),
                    ("backward", 10 * pairs * K * H, partial(pullback, out, g)),
                ):
                    rate = flops / b.seconds(fn) / 1e12
                    best[way] = max(best[way], rate)
                    b.say(f"{figure} {way} (TFLOP/s)", round(rate, 1))
    b.speed("best forward", best["forward"], 350, "TFLOP/s")
    b.speed("best backward", best["backward"], 280, "TFLOP/s")


def tiles() -> AttentionBackend:
    """The backend that does everything."""
    return next(backend for backend in BACKENDS if backend.name == "tiles")


def measured_step(b: Bench, name: str, cfg: Config, steps: int) -> float:
    """Seconds of a step; with them tokens a second, MFU, memory, launches and waiting. Expectations are the planner's."""
    dtype, tokens = b.pick(torch.bfloat16, torch.float32), cfg.recipe.batch_size * cfg.recipe.sequence_length
    step, want = recipe(cfg, dtype), b.expected.get("steps", {}).get(name, {})
    state, batch = random_state(step, cfg.model, b.device), batch_of(cfg, b.device)
    cuda, start = b.device.type == "cuda", time.perf_counter()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        state, metrics = step(state, batch)
    float(metrics["loss"])
    b.say(f"{name}: first three steps (s)", round(time.perf_counter() - start, 1))
    marks = [time.perf_counter()]
    with waiting(cuda) as waits:
        for _ in range(steps):
            state, metrics = step(state, batch)
    finite = bool(torch.isfinite(metrics["loss"]))
    seconds = (time.perf_counter() - marks[0]) / steps
    b.say(f"{name}: loss is finite", finite, True, "finite", finite)
    b.say(f"{name}: host waits a step", len(waits) / steps, 0, "0", not waits)
    rate = tokens / seconds
    b.say(f"{name}: tokens/s", round(rate), want.get("tokens_per_second") and round(want["tokens_per_second"]))
    mfu = rate * flops_per_token(cfg.model, cfg.recipe.sequence_length) / PEAK
    b.say(f"{name}: MFU", round(mfu, 4), want.get("mfu") and round(want["mfu"], 3))
    if cuda:
        used, planned = torch.cuda.max_memory_allocated(), want.get("bytes")
        close = planned and abs(used / planned - 1) <= 0.07
        b.say(f"{name}: peak (GB)", round(used / 1e9, 2), planned and round(planned / 1e9, 2), "within 7 %", close)
        retries = torch.cuda.memory_stats()["num_alloc_retries"]
        b.say(f"{name}: allocations again", retries, 0, "0", retries == 0)
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA] if cuda else [activity.CPU]) as profile:
        state, metrics = step(state, batch)
        if cuda:
            torch.cuda.synchronize()
    trace = Path(b.out.name).with_name(f"trace-{name.replace(' ', '-')}.json.gz")
    profile.export_chrome_trace(str(trace))
    b.say(f"{name}: trace", trace.name)
    if cuda:
        kernels = [event for event in profile.events() if str(event.device_type).endswith("CUDA")]
        b.say(f"{name}: kernels a step", len(kernels))
        busy = sum(event.self_device_time_total for event in kernels) / 1e6 / seconds
        b.say(f"{name}: GPU busy", round(busy, 3), None, ">= 0.95", busy >= 0.95)
        print(profile.key_averages().table("self_device_time_total", row_limit=15), file=sys.stderr)
    return seconds


@contextmanager
def waiting(cuda: bool) -> Iterator[list[Any]]:
    """The places inside where the host waits for the GPU, as torch warns of them."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        places: list[Any] = []
        if cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            if cuda:
                torch.cuda.set_sync_debug_mode("default")
            places += [str(warning.message) for warning in found if "synchroniz" in str(warning.message)]


def steps_of(fake: bool) -> dict[str, Config]:
    """The steps that are measured, which the planner is asked about as well."""
    one, seven = OLMO2["olmo2-1b"], OLMO2["olmo2-7b"]
    if fake:
        one = seven = dense(64, 4, 4, 128, vocab_size=256)
    rows, length, long = (2, 64, 64) if fake else (4, 4096, 8192)
    options: dict[str, Any] = {"dtype": "float32", "compile": False} if fake else {"dtype": "bfloat16"}
    return {
        "1B": config(one, rows, length, **options),
        "1B remat": config(one, rows, length, remat="full", **options),
        "7B of 2 blocks": config(replace(seven, n_layers=2), 1, long, **options),
        "7B of 4 blocks": config(replace(seven, n_layers=4), 1, long, **options),
    }


def step(b: Bench) -> None:
    """Steps of 1B."""
    for name in ("1B", "1B remat"):
        measured_step(b, name, steps_of(b.fake)[name], b.pick(8, 1))
        collect(b)


def captured(b: Bench) -> None:
    """Steps of 190M as a CUDA graph beside the same steps without one: the same losses, and how much faster."""
    model = b.pick(OLMO2["olmo2-190m"], dense(64, 2, 4, 128, vocab_size=256))
    rows, length = b.pick((4, 1024), (2, 64))
    frozen = b.pick((), ("embed",))  # whose gradient on a CPU finds out on the host which rows there are
    cfg = config(model, rows, length, dtype=b.pick("bfloat16", "float32"), compile=not b.fake, freeze=frozen)
    plain = recipe(cfg, b.pick(torch.bfloat16, torch.float32))
    graphs = capture(recorded_graphs, "cpu") if b.fake else capture()
    losses, times = [], []
    for made in (plain, graphs(plain)):
        torch.manual_seed(0)
        state, found, batch = random_state(made, model, b.device), [], batch_of(cfg, b.device)
        steps = b.pick(20, 6)
        for n in range(steps):
            if n == steps // 2:
                float(found[-1])
                start = time.perf_counter()
            state, metrics = made(state, batch)
            found.append(metrics["loss"])
        losses.append([float(x) for x in found])
        times.append((time.perf_counter() - start) / (steps - steps // 2))
        del state
        collect(b)
    worst = max(abs(x - y) for x, y in zip(*losses, strict=True))
    b.say("difference of losses with a graph", float(f"{worst:.2g}"), 0, "<= 0.01", worst <= 0.01)
    b.speed("steps with a graph, beside those without", times[0] / times[1], 1.0, "x")


def slice_of_7b(b: Bench) -> None:
    """Two and four blocks of 7B, from which follows what 32 take."""
    times = {n: measured_step(b, f"7B of {n} blocks", steps_of(b.fake)[f"7B of {n} blocks"], b.pick(6, 1)) for n in (2, 4)}
    block = (times[4] - times[2]) / 2
    b.say("a block of 7B (ms)", round(1e3 * block, 2))
    whole = times[2] + 30 * block
    b.say("7B of 32 blocks, extrapolated (tokens/s)", round(b.pick(8192, 64) / whole))


def checkpoint(b: Bench) -> None:
    """A state to disk while steps go on, and back: the same bits."""
    model = b.pick(OLMO2["olmo2-370m"], dense(64, 2, 4, 128, vocab_size=256))
    made = recipe(config(model, 1, 64, compile=False), torch.float32)
    state = random_state(made, model, b.device)
    whole = {"step": state.step, "params": state.params, "slots": state.slots}
    size = sum(x.nbytes for _, x in tree.items(whole))
    with tempfile.TemporaryDirectory() as folder:
        with Saver(folder) as saver:
            for n in (1, 2):
                start = time.perf_counter()
                saver.submit(whole, step=n)
                rate = size / (time.perf_counter() - start) / 1e9
                saver.wait()
        b.speed("submit, second time", rate, 15, "GB/s")
        start = time.perf_counter()
        like = tree.map(lambda x: torch.empty_like(x, device="meta"), whole)
        again, _ = load(Path(folder, "step2"), like, device=b.device)
        b.say("load (GB/s)", round(size / (time.perf_counter() - start) / 1e9, 2))
        equal = all(torch.equal(x, tree.at(again, path)) for path, x in tree.items(whole))
        b.say("bits after loading", equal, True, "equal", equal)


def nccl(b: Bench) -> None:
    """Groups of one rank: what is gathered, scattered and summed is what was given."""
    import torch.distributed as dist

    cuda = b.device.type == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else None
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, device_id=device)
    try:
        group = dist.new_group([0], backend="nccl" if cuda else "gloo")
        functional, x = torch.ops._c10d_functional, torch.randn(64, 32, device=b.device)
        for name, found in {
            "all_gather": functional.all_gather_into_tensor_out(x, 1, group.group_name, out=torch.empty_like(x)),
            "reduce_scatter": functional.reduce_scatter_tensor(x, "sum", 1, group.group_name),
            "all_reduce": functional.all_reduce(x, "sum", group.group_name),
            "all_to_all": functional.all_to_all_single(x, [64], [64], group.group_name),
        }.items():
            same = torch.equal(functional.wait_tensor(found), x)
            b.say(name, same, True, "equal", same)
        dist.barrier()
    finally:
        dist.destroy_process_group()


class StopAt:
    """An observer that ends a run after a step: by what it answers, or as a cluster does, by SIGTERM."""

    def __init__(self, step: int, by_signal: bool = False) -> None:
        self.step, self.by_signal = step, by_signal

    def __call__(self, event: Any) -> str | None:
        """What the loop asks of each event."""
        if getattr(event, "step", 0) != self.step or self.step == 8:
            return None
        if not self.by_signal:
            return "far enough"
        signal.raise_signal(signal.SIGTERM)
        self.step = 8  # once
        return None

    def close(self) -> None:
        """Nothing is open."""


def trainer(b: Bench) -> None:
    """A run, and the same run that stops half way, asked to or by SIGTERM, and goes on: the same losses, to the bit."""
    import numpy as np

    from olmo_fn.train.loop import train
    from olmo_fn.train.observers import read_metrics

    torch.use_deterministic_algorithms(True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            np.random.default_rng(0).integers(1, 250, 100_000, dtype=np.uint16).tofile(Path(folder, "tokens.npy"))
            data = Data(paths=(f"{folder}/tokens.npy",), dtype="uint16", heldout_fraction=0.01, cache_dir=f"{folder}/cache")
            cfg = config(dense(64, 2, 4, 128, vocab_size=256), 4, 64, compile=False, dtype="float32")
            losses, codes = [], []
            for name, stops in (("whole", (8,)), ("halves", (4, 8)), ("terminated", (4, 8))):
                for steps in stops:
                    run = Run(
                        folder=f"{folder}/{name}", steps=8, sample="", threads=1, checkpoint_every=4, device=b.device.type
                    )
                    with redirect_stdout(StringIO()):
                        ended = train(replace(cfg, data=data, run=run), [StopAt(steps, name == "terminated")])
                    codes.append(ended.exit_code)
                lines = read_metrics(Path(folder, name, "metrics.jsonl"))
                losses.append({line["step"]: line["loss"] for line in lines if "loss" in line})
            same = losses[0] == losses[1] == losses[2] and len(losses[0]) >= 2
            b.say("losses of runs that were resumed", same, True, "equal", same)
            b.say("exit codes", codes, [0, 0, 0, 143, 0], "SIGTERM is 143", codes == [0, 0, 0, 143, 0])
    finally:
        torch.use_deterministic_algorithms(False)


SECTIONS: tuple[tuple[Callable[[Bench], None], float], ...] = (
    (card, 5), (parity, 60), (attention, 35), (step, 100), (slice_of_7b, 40), (checkpoint, 25), (nccl, 10), (trainer, 20),
    (captured, 20),
)  # fmt: skip
"""Most valuable first, with the seconds that each may take."""


def collect(b: Bench) -> None:
    """Give memory back between measurements."""
    gc.collect()
    if b.device.type == "cuda":
        torch.cuda.empty_cache()
