"""``olmo-fn convert from-olmo-core DIR RUN``: a checkpoint of OLMo-core 2.x or 3.x as a run that goes on where it was."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from olmo_fn.fields import PATH

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from olmo_fn.checkpoint import Deferred
    from olmo_fn.formats.names import Stored
    from olmo_fn.formats.olmo_core_files import Checkpoint, TrainState
    from olmo_fn.models.config import Model
    from olmo_fn.train.config import Config
    from olmo_fn.train.optimizers import AdamW

MOMENTS = {"adamw_m": "exp_avg", "adamw_v": "exp_avg_sq"}
MODEL_ONLY = "; --params-only takes the model alone"


@dataclass(frozen=True)
class FromOlmoCore:
    """Make a run of a checkpoint of OLMo-core: its model, AdamW's moments, step, schedule, and order of the data."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """A step's folder, or one with several, of which the newest is taken; or what OLMo-core's unshard_checkpoint made."""
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder for the run; it must not be there."""
    params_only: bool = False
    """Take the model alone, to begin a training anew: no moments, step, schedule or data."""
    data_paths: Annotated[tuple[str, ...], PATH] = ()
    """Token files that the run goes on with, in their order; those that the checkpoint names when not given."""
    config: Path | None = None
    """OLMo-core's config.json, where there is none in the folder or above it."""


def from_olmo_core(args: FromOlmoCore) -> int:
    """Make the run, whole or not at all, and say what to type next. ValueError, in one line, for what is not read."""
    from olmo_fn import tree
    from olmo_fn.checkpoint import Deferred, save
    from olmo_fn.convert.run import check_new
    from olmo_fn.formats.olmo_core_files import open_checkpoint
    from olmo_fn.progress import progress
    from olmo_fn.train.folder import write_config
    from olmo_fn.train.schedule import sizes

    run = args.run
    check_new(run)
    found = open_checkpoint(args.folder, args.config, with_state=not args.params_only)
    made, names = read_model(found)
    if args.params_only:
        cfg, step, meta = begun_anew(made), 0, dict[str, Any]()
        leaves: Iterator[tuple[str, Any]] = parameters(found, made, names)
    else:
        if found.state is None:
            raise ValueError(f"{found.folder} has no train/rank0.pt, and so no step to go on from{MODEL_ONLY}")
        try:
            cfg = gone_on(found, found.state, made, names, args.data_paths)
        except ValueError as error:
            raise ValueError(f"{error}{MODEL_ONLY}") from None
        step, leaves = found.state.step, whole_state(found, found.state, cfg, names)
        meta = {
            "tokens": sizes(cfg).tokens_before(step),
            "olmo_core": {**found.state._asdict(), "data": dict(found.state.data)},
        }
    cfg = replace(cfg, run=replace(cfg.run, folder=str(run)))
    cfg.check()
    state = dict(leaves)
    run.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=f".{run.name}-", dir=run.parent) as beside,
        progress("reading", sum(leaf.nbytes for leaf in state.values())) as advance,
    ):

        def shown(path: str, leaf: Tensor | Deferred) -> Tensor | Deferred:
            def make() -> Tensor:
                advance(leaf.nbytes, path)
                return leaf.make()  # type: ignore[union-attr]

            return Deferred(leaf.shape, leaf.dtype, make) if isinstance(leaf, Deferred) else leaf

        draft = Path(beside) / "run"
        write_config(cfg, draft)
        written = tree.unflatten((path, shown(path, leaf)) for path, leaf in state.items())
        save(written, draft / "checkpoints", step=step, meta=meta, threads=1)
        draft.rename(run)
    print(summary(run, made, cfg, found))
    return 0


def read_model(found: Checkpoint) -> tuple[Model, dict[str, Stored]]:
    """The model, and how the checkpoint has each parameter, by its path here.

    ValueError that names a field of the config that is not read; and a tensor which is missing, one too many, or of another
    shape, with both shapes.
    """
    from olmo_fn.formats.names import stored
    from olmo_fn.formats.olmo_core_model import model

    made = model(found.config)
    names = stored(made, "olmo_core")
    wanted = {f"model.{name.name}": tuple(name.shape) for name in names.values()}
    if made.tie_embeddings and (head := "model.lm_head.w_out.weight") in found.tensors:  # the embedding once more
        embed = "model.embeddings.weight"
        wanted[head] = wanted[embed]
        check_tensors(found, "model.", wanted)
        if not found.tensors[head].make().equal(found.tensors[embed].make()):
            raise ValueError(f"{found.folder}: {head} is not {embed}, though tie_word_embeddings is true")
    check_tensors(found, "model.", wanted)
    return made, names


def check_tensors(found: Checkpoint, prefix: str, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError unless the tensors whose names begin with ``prefix`` are those ``wanted``, of these shapes."""
    for name, shape in wanted.items():
        there = found.tensors.get(name)
        if there is None:
            raise ValueError(f"{found.folder} lacks {name} {list(shape)}, which the model of its config.json has")
        if tuple(there.shape) != shape:
            raise ValueError(f"{found.folder}: {name} is {list(there.shape)}, and {list(shape)} by its config.json")
        if not there.dtype.is_floating_point:
            raise ValueError(f"{found.folder}: {name} holds {str(there.dtype).removeprefix('torch.')}, and must hold floats")
    for name, there in found.tensors.items():
        if name.startswith(prefix) and name not in wanted:
            raise ValueError(f"{found.folder} has {name} {list(there.shape)}, for which its config.json has no place")


def begun_anew(made: Model) -> Config:
    """The config of a run that takes the weights alone."""
    from olmo_fn.train.config import Config
    from olmo_fn.train.schedules import Cosine

    return Config(made, schedule=Cosine(warmup=0.1))


def gone_on(
    found: Checkpoint, state: TrainState, made: Model, names: Mapping[str, Stored], data_paths: tuple[str, ...]
) -> Config:
    """The config of a run that goes on; ValueError for what cannot."""
    from olmo_fn.convert.olmo_core_training import training

    names = trained(names)
    wanted = {f"optim.state.{n.name}.{slot}": tuple(n.shape) for n in names.values() for slot in MOMENTS.values()}
    check_tensors(found, "optim.state.", wanted | {f"optim.state.{n.name}.step": () for n in names.values()})
    cfg = training(found.config, made, {path: name.name for path, name in names.items()}, state.max_steps)
    dtypes = {str(found.tensors[name].dtype).removeprefix("torch.") for name in wanted}
    if len(dtypes) > 1 or not dtypes <= {"float32", "bfloat16"}:
        there = " and ".join(sorted(dtypes))
        raise ValueError(f"{found.folder}: AdamW's moments are in {there}; they must be all in float32, or all in bfloat16")
    seed, paths = state.data.get("seed"), data_paths or found.paths or cfg.data.paths
    if not paths:
        raise ValueError(f"{found.folder} names no token files to go on with; give --data-paths")
    data = replace(cfg.data, paths=paths, order="olmo-core", order_seed=seed if type(seed) is int else cfg.data.order_seed)
    optim: Any = cfg.optim
    return replace(cfg, data=data, optim=replace(optim, moments=dtypes.pop()))


def parameters(found: Checkpoint, made: Model, names: Mapping[str, Stored]) -> Iterator[tuple[str, Deferred]]:
    """The parameters as a checkpoint of this package has them, in fp32; each is read when it is written."""
    import torch

    for path, leaf in _turned(found, made, names, "model.{}", torch.float32):
        yield f"params.{path}", leaf


def whole_state(
    found: Checkpoint, state: TrainState, cfg: Config, names: Mapping[str, Stored]
) -> Iterator[tuple[str, Tensor | Deferred]]:
    """The state of training as a checkpoint of this package has it."""
    import torch

    optim: Any = cfg.optim
    yield "step", torch.tensor(state.step)
    yield from parameters(found, cfg.model, names)
    names = trained(names)
    yield "slots.adamw.count", torch.tensor(updates(found, state, optim, names))
    moments = {path: name._replace(offset=0.0) for path, name in names.items()}
    for slot, theirs in MOMENTS.items():
        for path, leaf in _turned(found, cfg.model, moments, f"optim.state.{{}}.{theirs}", getattr(torch, optim.moments)):
            yield f"slots.{slot}.{path}", leaf


def _turned(
    found: Checkpoint, made: Model, names: Mapping[str, Stored], place: str, dtype: torch.dtype
) -> Iterator[tuple[str, Deferred]]:
    """By its path, each tensor at ``place`` in our form."""
    from olmo_fn import tree
    from olmo_fn.checkpoint import Deferred
    from olmo_fn.models.transformer import specs

    def leaf(shape: tuple[int, ...], name: Stored) -> Deferred:
        return Deferred(shape, dtype, lambda: name.ours(found.tensors[place.format(name.name)].make().to(dtype)))

    for path, spec in tree.items(specs(made)):
        if path in names:
            yield path, leaf(spec.shape, names[path])


def trained(names: Mapping[str, Stored]) -> dict[str, Stored]:
    """Those of the parameters that AdamW moves: experts' biases are moved by their loads, and are buffers there."""
    from olmo_fn.transforms.balance import BIAS

    return {path: name for path, name in names.items() if not path.endswith(BIAS)}


def updates(found: Checkpoint, state: TrainState, optim: AdamW, names: Mapping[str, Stored]) -> int:
    """How many updates AdamW has made, which must be as many for all parameters: here they are counted together."""
    counts: dict[float, str] = {}
    for stored in names.values():
        counts.setdefault(float(found.tensors[f"optim.state.{stored.name}.step"].make()), stored.name)
    (number, name), *others = counts.items()
    if others:
        raise ValueError(
            f"{found.folder}: AdamW has made {number:g} updates of {name} and {others[0][0]:g} of {others[0][1]}, and here is "
            f"one count for all{MODEL_ONLY}"
        )
    if not number.is_integer() or number < 0:
        raise ValueError(f"{found.folder}: damaged, optim.state.{name}.step is {number:g}, which is no number of updates")
    return int(number) or (state.step if optim.first_step_bias else 0)  # OLMo-core does not count with that


def summary(run: Path, made: Model, cfg: Config, found: Checkpoint) -> str:
    """What was read, and what to type next."""
    from olmo_fn.convert.olmo_core_training import lost
    from olmo_fn.models.count import in_words

    state = found.state
    name = shlex.quote(str(run))
    what = f"{run}: {in_words(made)}"
    if state is None:
        start = f"--run.start-from {name} --run.start-with params --run.folder {name}-2"
        return f"{what}\ntrain on:      olmo-fn train {name} {start} --data.paths 'tokens/part-*.npy'"
    lines = [f"{what}, AdamW's moments, and step {state.step} of {cfg.run.steps}"]
    if state.max_steps not in (None, cfg.run.steps):
        lines.append(f"steps:         the schedule is of {cfg.run.steps}, OLMo-core's run of {state.max_steps}")
    files = f"{len(cfg.data.paths)} token file{'s' * (len(cfg.data.paths) != 1)}"
    left = lost(found.config)
    lines.append(f"data:          {files} in the order of seed {cfg.data.order_seed}; {_place(cfg, state, not left)}")
    if left:
        lines.append(f"not kept:      {', '.join(left)}")
    if missing := next((path for path in cfg.data.paths if not Path(path).exists()), ""):
        lines.append(f"               {missing} is not here: bring it, or put another into {name}/config.yaml, data.paths")
    return "\n".join([*lines, f"go on:         olmo-fn train {name}"])


def _place(cfg: Config, state: TrainState, alike: bool) -> str:
    """Whether the batches go on where they were."""
    from olmo_fn.train.schedule import sizes

    data = state.data
    epoch, batches = data.get("epoch"), data.get("batches_processed")
    alike = alike and state.tokens in (None, sizes(cfg).tokens_before(state.step)) and data.get("dataset_type", "fsl") == "fsl"
    if alike and (epoch, batches) == (1, state.step):
        return f"the next batch is number {state.step + 1:,} of epoch 1, as there"
    return f"OLMo-core was behind batch {batches} of epoch {epoch}, and the next batch may be another here"
