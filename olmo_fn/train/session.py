"""A run, opened: its step, its batches, its states, its model. Whatever reads a run opens it here, and so sees the same."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from olmo_fn import tree
from olmo_fn.checkpoint import Index, load, load_newest, read_index, step_path, steps, stream
from olmo_fn.core.chain import Batch
from olmo_fn.core.step import State, Step
from olmo_fn.data.heldout import TokenSet, heldout_batches
from olmo_fn.data.source import HELDOUT, Source, open_data
from olmo_fn.data.tokenizer import Tokenizer
from olmo_fn.data.tokenizer import load as load_tokenizer
from olmo_fn.fields import expanded
from olmo_fn.launch.process import agree
from olmo_fn.models import transformer
from olmo_fn.models.batch import with_packing
from olmo_fn.spec import abstract
from olmo_fn.train import machine
from olmo_fn.train.check_attention import attention_of
from olmo_fn.train.config import Config
from olmo_fn.train.evals import Heldout, evaluate
from olmo_fn.train.folder import origin, read_config, runs_near
from olmo_fn.train.process import ProcessContext
from olmo_fn.train.recipe import first_parameters, parameters, recipe
from olmo_fn.train.schedule import sizes
from olmo_fn.transforms.lora import adapted, merge_lora
from olmo_fn.tree import Tree

T = TypeVar("T")
Weights: TypeAlias = Literal["params", "ema", "merge"]


def open_run(run: Session | Config | str | Path, process: ProcessContext | None = None) -> Session:
    """Open a run by its config or its folder. Nothing but the config is read yet.

    ``process``: this process among those that train; a process alone, on the run's own device, when not given.
    """
    if isinstance(run, Session):
        return run
    cfg = expanded(run) if isinstance(run, Config) else read_config(Path(run))
    folder = Path(cfg.run.folder if isinstance(run, Config) else run).expanduser()
    process = process or ProcessContext(machine.pick_device(cfg.run.device))
    machine.prepare(process.device)
    dtype = machine.compute_dtype(cfg.recipe.dtype, process.device)
    machine.check_float8(cfg.recipe.float8, process.device, dtype)
    return Session(cfg, folder, process, dtype, parameters(cfg))


class Loaded(NamedTuple):
    """A state; the checkpoint that it is from, or None; the slots that were begun anew because that has none."""

    state: State
    checkpoint: Path | None = None
    new_slots: tuple[str, ...] = ()


@dataclass(frozen=True)
class Session:
    """An open run. ``dtype`` is that of the computation; ``specs`` are of all parameters, adapters included."""

    cfg: Config
    folder: Path
    process: ProcessContext
    dtype: torch.dtype
    specs: Tree = field(repr=False)

    @cached_property
    def step(self) -> Step:
        """The training step, which a reader of weights does not need; ValueError for a recipe that cannot be."""
        cfg = attention_of(self.cfg, self.process.device)
        if self.process.device.type != "cuda":  # what reads a run may be elsewhere than what trains it
            cfg = replace(cfg, recipe=replace(cfg.recipe, capture=False))
        return recipe(cfg, self.dtype, self.process.connection)

    @cached_property
    def source(self) -> Source:
        """The data, opened when first asked for, by all processes together; ValueError for what cannot be trained on."""
        cfg, show = self.cfg, self.process.is_main
        source = self.process.local_main_first(
            lambda: open_data(cfg.data, cfg.model.vocab_size, sizes(cfg), show, cfg.run.steps)
        )
        agree(fingerprint(source), "data", self.process.process)
        return source

    def batch(self, step: int) -> Batch:
        """`rows` on this process's device."""
        return {name: x.to(self.process.device) for name, x in self.rows(step).items()}

    def rows(self, step: int) -> Batch:
        """The batch of the step that follows ``step`` others, in host memory: the rows that the process computes, and of them
        those of each part that gradients are accumulated over.
        """
        read, sharing = self.source.train, self.step.execution.layout.sharing
        slices = sharing.rows(read.rows(step), self.cfg.recipe.accumulate)
        parts = [read(step, rows) for rows in slices]
        if self.cfg.model.drops:
            for part, rows in zip(parts, slices, strict=True):
                part["rows"] = row_numbers(self.cfg.run.seed, step, rows.start, len(part["input_ids"]))
        if self.reported_sources:
            sources = torch.from_numpy(read.sources(step))
            for part, rows in zip(parts, slices, strict=True):
                part["sources"] = sources[rows]
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if len(parts) > 1 else parts[0]
        return with_packing(whole, self.process.device)

    @cached_property
    def reported_sources(self) -> tuple[str, ...]:
        """Names of the sources whose losses are reported; ValueError if the data has others."""
        count = getattr(self.cfg.loss, "sources", 0)
        if count and count != len(names := self.source.sources):
            there = f"{len(names)}" if names else "no sources: it names none without --data.mix"
            raise ValueError(f"--loss.sources is {count}, and the data has {there}; give --loss.sources {len(names)}")
        return self.source.sources if count else ()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's own copy of it, or else the one that its config names. ValueError without any that fits the model."""
        own, data = self.folder / "tokenizer.json", self.cfg.data
        path = own if own.is_file() else data.tokenizer
        if not path:
            raise ValueError(f"{self.folder} holds no tokenizer.json; put the one there that its data was tokenized with")
        tokenizer = load_tokenizer(path, data.eos)
        if tokenizer.vocab_size > self.cfg.model.vocab_size:
            raise ValueError(
                f"{path} has {tokenizer.vocab_size:,} ids and the model {self.cfg.model.vocab_size:,}; "
                f"put the tokenizer.json into {self.folder} that its data was tokenized with"
            )
        return tokenizer

    def first_state(self) -> State:
        """The state with the initial weights."""
        return self.step.init(first_parameters(self.cfg, self.step, self.process.device))

    def resume(self) -> Loaded:
        """What the run goes on from: its newest whole checkpoint, or that of ``run.start_from``, or the initial weights.

        All processes call it together, and have looked at the folder when it returns.
        """
        run = self.cfg.run
        found = self.newest(self.folder)
        if found is None and run.start_from:
            params_only = run.start_with == "params" or self.cfg.lora.rank > 0
            found = self._params_of(origin(self.cfg)) if params_only else self.newest(origin(self.cfg))
            if found is None:
                raise ValueError(f"--run.start-from {run.start_from!r}: there is no whole checkpoint")
            if (done := int(found.state.step)) >= run.steps:
                raise ValueError(
                    f"--run.start-from {run.start_from}: {done} steps are done there, so that of --run.steps {run.steps} "
                    "none is left; give more, or --run.start-with params to begin anew"
                )
        return found or Loaded(self.first_state())

    def newest(self, where: Path, **options: Any) -> Loaded | None:
        """The newest whole checkpoint in the run folder ``where``, or where that is one; ``options`` as `load_newest` has."""
        expected = abstract_state(self.step, self.specs)

        def read(path: Path) -> Tree:
            like, select = stored_part(
                expected, read_index(path), whole=self.cfg.mesh.pp == 1
            )  # a pipeline's stage asks for less
            return load(path, like, select=select, device=self.process.device)[0]

        found = self.find(where, read, **options)
        if found is None:
            return None
        state, new = with_new_slots(self.step, found[1], expected["slots"])
        return Loaded(state, found[0], new)

    def _params_of(self, where: Path) -> Loaded | None:
        """A new state with the model's parameters of another run; adapters are new."""
        like = {"params": abstract(transformer.specs(self.cfg.model))}
        found = self.find(where, lambda path: load(path, like, select=["params.*"], device=self.process.device)[0])
        if found is None:
            return None
        params = {**first_parameters(self.cfg, self.step, self.process.device), **found[1]["params"]}
        return Loaded(self.step.init(params), found[0])

    def find(self, where: Path, read: Callable[[Path], T], **options: Any) -> tuple[Path, T] | None:
        """``read`` of the checkpoint ``where``, or of the newest whole one of that run; ``options`` as `load_newest` has."""
        if (where / "index.json").is_file():
            return where, read(where)
        return load_newest(where / "checkpoints", read, ranks=self.process.ranks, **options)

    def model_parameters(self, state: State, weights: Weights = "params") -> Tree:
        """The parameters of an ordinary model, out of a state: these or their averages, with adapters merged into them."""
        return self._model(as_tree(state), tree.flatten(state.params), weights, "the state")  # of a pipeline a rank has a stage

    def read_model(self, where: Path, weights: Weights = "params", **options: Any) -> tuple[Tree, Path] | None:
        """`model_parameters` of a checkpoint, or of the newest whole one of a run, and its path. Reads only what it needs."""
        self.check_kept(where, weights)
        leaves = tree.flatten(abstract(self.specs))

        def read(path: Path) -> Tree:
            places = weight_places(weights, leaves, read_index(path).tensors, where)
            like = tree.unflatten((place, leaves[path]) for path, place in places.items())
            return load(path, like, select=list(places.values()), device=self.process.device)[0]

        found = self.find(where, read, **options)
        return found and (self._model(found[1], leaves, weights, where), found[0])

    def stream_model(self, checkpoint: Path, weights: Weights = "params") -> Iterator[tuple[str, torch.Tensor]]:
        """`read_model` of one checkpoint, a parameter at a time: paths and tensors on the CPU."""
        self.check_kept(checkpoint, weights)
        leaves = tree.flatten(abstract(self.specs))
        places = weight_places(weights, leaves, read_index(checkpoint).tensors, checkpoint)
        parts = {
            path: [part for part in (path, f"lora.{path}.a", f"lora.{path}.b") if part in leaves]
            for path in leaves
            if not path.startswith("lora.")
        }
        tensors = stream(checkpoint, {places[part]: leaves[part] for found in parts.values() for part in found})
        for path, found in parts.items():
            w, *ab = (next(tensors)[1] for _ in found)
            yield path, adapted(w, ab[0], ab[1], self.cfg.lora.alpha) if ab else w

    def check_kept(self, where: Path, weights: Weights) -> None:
        """ValueError for a kind of weights that the run does not keep."""
        setting = {"ema": "ema", "merge": "merge_last"}.get(weights)
        if setting and not getattr(self.cfg.recipe, setting):
            flag = f"--recipe.{setting.replace('_', '-')}"
            raise ValueError(f"{where} kept no {weights} of its weights ({flag} was 0); use --weights params")

    def evaluate(
        self, state: State, weights: Weights = "params", name: str = HELDOUT, given_up: Callable[[], bool] = lambda: False
    ) -> Heldout | None:
        """The model's loss on a set that is held out, on at most ``run.eval_tokens`` of it.

        None when nothing is predicted, and when it is ``given_up``, which is asked before each batch.
        """
        source = self.source
        if name not in source.heldout:
            return None
        tokens = source.heldout[name].first(self.cfg.run.eval_tokens)
        params = self.model_parameters(state, weights)
        return self.evaluate_tokens(params, tokens, source.tokenizer, source.eos_id, given_up=given_up)

    def evaluate_tokens(
        self,
        params: Tree,
        tokens: TokenSet,
        tokenizer: Tokenizer | None,
        eos_id: int | None,
        show: Callable[[int], Any] = lambda tokens: None,
        given_up: Callable[[], bool] = lambda: False,
    ) -> Heldout | None:
        """The loss of an ordinary model's parameters on ``tokens``, in windows and batches of the sizes of training.

        None when nothing is predicted, or it is ``given_up``. ``show`` gets the number of tokens of each batch that is done.
        """
        r = self.cfg.recipe
        stride, rows = max(1, r.sequence_length // 2), max(1, r.batch_size // r.accumulate)
        batches = heldout_batches(tokens, r.sequence_length, stride, rows, eos_id, self.cfg.data.mask_documents)
        going = takewhile(lambda _: not given_up(), batches)
        device = self.process.device
        there = ({name: value.to(device) for name, value in with_packing(batch, device).items()} for batch in going)
        num_bytes, loss = tokens.num_bytes(tokenizer), transformer.loss(self.cfg.model)
        found = evaluate(loss, params, there, num_bytes, dtype=self.dtype, execution=self.step.execution, show=show)
        return None if given_up() else found

    def merged(self, params: Tree) -> Tree:
        """The parameters with adapters, if the run trains any, merged into the model's."""
        return merge_lora(params, self.cfg.lora.alpha) if self.cfg.lora.rank else params

    def _model(self, state: Tree, paths: Iterable[str], weights: Weights, holder: object) -> Tree:
        values = tree.flatten(state)
        places = weight_places(weights, paths, values, holder)
        return self.merged(tree.unflatten((path, values[place]) for path, place in places.items()))


def load_parameters(
    run: str | Path,
    *,
    step: int | None = None,
    weights: Weights = "params",
    device: torch.device | str = "cpu",
    say: Callable[[str], Any] = lambda line: print(line, file=sys.stderr),
) -> tuple[Session, Tree, Path]:
    """The parameters of a run's model, as they are stored; the run, opened; and the checkpoint that they are from.

    ``run`` is the run's folder, of which the newest whole checkpoint is taken or that of ``step``, or one of its checkpoints.
    ``weights``: the parameters, their moving average, or the mean of the last steps; adapters are merged into them. ``say``
    gets a line for each broken checkpoint that is passed over. ValueError for what is not there.
    """
    folder, checkpoint = find_run(Path(run), step)
    session = open_run(folder, ProcessContext(torch.device(device)))
    found = session.read_model(checkpoint or folder, weights, on_skip=say)
    if found is None:
        raise ValueError(f"{run} holds no whole checkpoint; one is written every --run.checkpoint-every steps")
    return session, *found


def find_run(where: Path, step: int | None = None) -> tuple[Path, Path | None]:
    """The run's folder, and the checkpoint where ``where`` or ``step`` names one; ValueError if it is not there."""
    inside = where.resolve()
    if (inside / "index.json").is_file() and (inside.parent.parent / "config.yaml").is_file():
        if step is not None:
            raise ValueError(f"{where} is one checkpoint already; leave out --step, or give the run's folder")
        return inside.parent.parent, inside
    if not (inside / "config.yaml").is_file():
        what = "is no run, it holds no config.yaml" if where.is_dir() else "is not there"
        raise ValueError(f"{where} {what}; give the folder of a run, or one of its checkpoints{runs_near(where)}")
    if step is None:
        return inside, None
    if step not in (saved := steps(inside / "checkpoints")):
        raise ValueError(f"{where} has no checkpoint of step {step}; it has {', '.join(map(str, saved)) or 'none'}")
    return inside, step_path(inside / "checkpoints", step)


def weight_places(weights: str, paths: Iterable[str], names: Collection[str], holder: object) -> dict[str, str]:
    """Where in a state with the leaves ``names`` the ``weights`` of each parameter are: a slot has those that are trained.

    ValueError that names the ``holder`` of the state when it has none at all.

    >>> weight_places("ema", ["embed", "w"], ["params.embed", "params.w", "slots.ema.w"], "runs/a")
    {'embed': 'params.embed', 'w': 'slots.ema.w'}
    """
    places = {path: slot if (slot := f"slots.{weights}.{path}") in names else f"params.{path}" for path in paths}
    if weights != "params" and not any(place.startswith("slots.") for place in places.values()):
        raise ValueError(f"{holder} holds no {weights} of its weights; use --weights params")
    return places


def as_tree(state: State) -> Tree:
    """The state as one tree, as checkpoints hold it."""
    return {"step": state.step, "params": state.params, "slots": state.slots}


def abstract_state(step: Step, specs: Tree) -> Tree:
    """A state's names, shapes and dtypes, on the meta device."""
    return as_tree(step.init(abstract(specs)))


def stored_part(expected: Tree, index: Index, whole: bool = True) -> tuple[Tree, list[str]]:
    """What a checkpoint has of the ``expected`` state, and the paths to read: all of it (``whole``), or just those expected.

    Slots that it lacks are left out, for `with_new_slots` to begin. Slots of parameters that are frozen by now may be in it,
    and are not read.
    """
    stored = {path.split(".")[1] for path in (*index.tensors, *index.empty) if path.startswith("slots.")}
    like = {**expected, "slots": {name: slot for name, slot in expected["slots"].items() if name in stored}}
    params = tree.flatten(expected["params"]).keys()
    trained = params & {path for slot in expected["slots"].values() for path, _ in tree.items(slot)}
    frozen = params - trained if trained else set()
    unread = {path for path in index.tensors if path.startswith("slots.") and path.split(".", 2)[-1] in frozen}
    names = index.tensors if whole else tree.flatten(like)
    return like, [*(name for name in names if name not in unread), *index.empty]


def with_new_slots(step: Step, loaded: Tree, slots: Collection[str]) -> tuple[State, tuple[str, ...]]:
    """The loaded state, in which those of ``slots`` that it lacks are begun from its parameters, and their names.

    So a transform can be added to a run at any time: `ema` starts at the parameters of that step.
    """
    new = tuple(name for name in slots if name not in loaded["slots"])
    fresh = step.init(loaded["params"]).slots if new else {}
    return State(loaded["step"], loaded["params"], {**loaded["slots"], **{name: fresh[name] for name in new}}), new


def fingerprint(source: Source) -> str:
    """What two processes with the same data agree on, as text."""
    parts = {name: f"{zlib.crc32(x.numpy().tobytes()):08x}" for name, x in source.train(0).items() if x.ndim}
    return f"held-out tokens { {name: len(found) for name, found in source.heldout.items()} }\nfirst batch {parts}"


def row_numbers(seed: int, step: int, start: int, count: int) -> Tensor:
    """Numbers (count,) int64 of a step's rows from ``start`` on, by which dropout tells the sequences of a run apart.

    19 bits of the seed, 24 of the step and 20 of the row.

    >>> row_numbers(0, 1, 2, 2).tolist(), row_numbers(2**40 + 1, 0, 0, 1).tolist()
    ([1048578, 1048579], [17592186044416])
    """
    return (seed % (1 << 19) << 44) + (step % (1 << 24) << 20) + start + torch.arange(count)
