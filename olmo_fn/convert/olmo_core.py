"""``olmo-fn convert from-olmo-core DIR RUN``: a checkpoint of OLMo-core 2.x or 3.x as a run that goes on where it was.

Parameters and AdamW's moments come tensor by tensor out of `olmo_fn.convert.dcp`; the config out of its config.json
(`olmo_fn.convert.olmo_core_model`, `olmo_fn.convert.olmo_core_training`); and out of the trainer's state the step, the length
of the run, and where the data were.
"""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import tyro

from olmo_fn.fields import PATH

if TYPE_CHECKING:
    from torch import Tensor

    from olmo_fn.checkpoint import Deferred
    from olmo_fn.convert.names import Stored
    from olmo_fn.models.config import Model
    from olmo_fn.train.config import Config

LARGEST_CONFIG = 16 << 20  # bytes
MOMENTS = {"adamw_m": "exp_avg", "adamw_v": "exp_avg_sq"}
MODEL_ONLY = "--params-only takes the model alone"
IN_TRAIN_STATE = frozenset(
    {
        *("numpy.ndarray", "numpy.dtype", "_codecs.encode", "builtins.set", "torch.Size", "pathlib.PosixPath"),
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    }
)
"""What the trainer's state may name besides tensors; none of it is read."""


@dataclass(frozen=True)
class FromOlmoCore:
    """A run from a checkpoint of OLMo-core: its model, AdamW's moments, step, schedule, and order of the data."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """A step's folder, or one with several, of which the newest is taken; or what OLMo-core's unshard_checkpoint made."""
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the new run; it must not be there."""
    params_only: bool = False
    """Take the model alone, to begin a training anew: no moments, step, schedule or data."""
    data_paths: Annotated[tuple[str, ...], PATH] = ()
    """Token files that the run goes on with, in their order; those that the checkpoint names when not given."""
    config: Path | None = None
    """OLMo-core's config.json, where there is none in the folder or above it."""


class TrainState(NamedTuple):
    """What is read of a trainer's state; ``data``: its numbers and texts on where the data were."""

    step: int
    max_steps: int | None
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of OLMo-core: its tensors by name, its config, its trainer's state if it has one, and its data's files."""

    folder: Path
    tensors: Mapping[str, Deferred] = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)
    state: TrainState | None = None
    paths: tuple[str, ...] = ()


def from_olmo_core(args: FromOlmoCore) -> int:
    """Make the run, whole or not at all, and say what to type next. ValueError, in one line, for what is not read."""
    from olmo_fn import tree
    from olmo_fn.checkpoint import save
    from olmo_fn.train.folder import numbers, write_config
    from olmo_fn.train.schedule import sizes

    if args.run.exists():
        raise ValueError(f"{args.run} is there already; choose another folder for the run")
    found = open_checkpoint(args.folder, args.config)
    cfg, names = config_of(found, args)
    step = 0 if args.params_only or found.state is None else found.state.step
    meta: dict[str, Any] = {"tokens": sizes(cfg).tokens_before(step), "config": numbers(cfg)}
    if found.state is not None:
        meta["olmo_core"] = {"step": found.state.step, "max_steps": found.state.max_steps, "data": dict(found.state.data)}
    state = tree.unflatten(leaves(found, cfg, names, args.params_only))
    args.run.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".from-olmo-core-", dir=args.run.parent) as beside:
        draft = Path(beside) / "run"
        write_config(cfg, draft)
        save(state, draft / "checkpoints", step=step, meta=meta, threads=1)
        draft.rename(args.run)
    print(summary(args, found, cfg))
    return 0


def open_checkpoint(folder: Path, config: Path | None = None) -> Checkpoint:
    """What there is in a folder; no tensor is read yet. ValueError, in one line, for what is no checkpoint, or damaged."""
    folder = newest(folder)
    tensors = open_tensors(folder)
    path = config or next((p for p in (folder / "config.json", folder.parent / "config.json") if p.is_file()), None)
    if path is None:
        raise ValueError(
            f"there is no config.json in {folder} or above it, and only that says what the model is: OLMo-core's "
            "ConfigSaverCallback writes it, name one with --config"
        )
    state, listed = folder / "train" / "rank0.pt", folder / "data_paths.txt"
    paths = tuple(listed.read_text(encoding="utf-8", errors="replace").split("\n")) if listed.is_file() else ()
    return Checkpoint(folder, tensors, read_config(path), read_train_state(state) if state.is_file() else None, paths)


def newest(folder: Path) -> Path:
    """The folder itself, or the newest ``step…`` in it."""
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is {'no folder' if folder.exists() else 'not there'}; give that of a checkpoint of OLMo-core"
        )
    inside = [path for path in folder.glob("step*") if path.name[4:].isdecimal() and (path / "model_and_optim").is_dir()]
    return max(inside, key=lambda path: int(path.name[4:]), default=folder)


def open_tensors(folder: Path) -> dict[str, Deferred]:
    """The tensors of a checkpoint, sharded or not, as ``model.<name>`` and ``optim.state.<name>.<slot>``."""
    from olmo_fn.convert.dcp import read_metadata
    from olmo_fn.convert.torch_files import read_tensors

    for inside in (folder / "model_and_optim", folder):
        if (inside / ".metadata").is_file():
            return read_metadata(inside)
    for suffix, read in ((".safetensors", read_safetensors), (".pt", read_tensors)):
        files = sorted((folder / "model").glob(f"*{suffix}")) or [folder / f"model{suffix}"]
        if files[0].is_file():
            found = {f"model.{name}": tensor for path in files for name, tensor in read(path).items()}
            optim = read_tensors(folder / "optim.pt") if (folder / "optim.pt").is_file() else {}
            return found | {f"optim.{name}": tensor for name, tensor in optim.items()}
    raise ValueError(
        f"{folder} is no checkpoint of OLMo-core: it has no model_and_optim/.metadata, no .metadata, no model.safetensors and "
        "no model.pt, nor folders step… with one"
    )


def read_safetensors(path: Path) -> dict[str, Deferred]:
    """The tensors of a safetensors file; none of them is read yet."""
    from olmo_fn.checkpoint import Deferred
    from olmo_fn.convert.tensors import StoredTensor, read_header

    def read(tensor: StoredTensor) -> Tensor:
        import torch

        return torch.cat([rows for _, rows in tensor.rows()]).reshape(tensor.shape)

    return {name: Deferred(tensor.shape, tensor.dtype, partial(read, tensor)) for name, tensor in read_header(path).items()}


def read_config(path: Path) -> dict[str, Any]:
    """OLMo-core's config.json; ValueError for what is no JSON object."""
    try:
        with path.open(encoding="utf-8") as file:
            found = json.loads(file.read(LARGEST_CONFIG))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is no JSON ({type(error).__name__}); it must be the config.json that OLMo-core writes"
        ) from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object; it must be the config.json that OLMo-core writes")
    return found


def read_train_state(path: Path) -> TrainState:
    """What is read of ``train/rank0.pt``, by the reader of pickles that builds nothing."""
    from olmo_fn.convert.torch_files import IN_TENSORS, Place, TorchFile

    with TorchFile(Place(path, 0, path.stat().st_size)) as file:
        state = file.pickle(IN_TENSORS | IN_TRAIN_STATE)
    state = state if type(state) is dict else {}
    step, max_steps = state.get("global_step"), state.get("max_steps")
    if type(step) is not int or not all(n is None or (type(n) is int and 0 <= n < 1 << 53) for n in (step, max_steps)):
        raise ValueError(f"{path}: damaged, or of no trainer: its global_step and max_steps are no numbers of steps")
    data = state.get("data_loader", state.get("dataset"))
    kept = {str(key): value for key, value in data.items() if type(value) in (int, str)} if type(data) is dict else {}
    return TrainState(step, max_steps, kept)


def config_of(found: Checkpoint, args: FromOlmoCore) -> tuple[Config, dict[str, Stored]]:
    """The config of the run, and how the checkpoint has each parameter, by path. ValueError for what does not fit."""
    from olmo_fn.convert.names import stored
    from olmo_fn.convert.olmo_core_model import model
    from olmo_fn.convert.olmo_core_training import training
    from olmo_fn.train.config import Config, Run
    from olmo_fn.train.schedules import Cosine

    made = model(found.config)
    names = stored(made, "olmo_core")
    check_tensors(found, made, names, args.params_only)
    if args.params_only:
        cfg = Config(made, schedule=Cosine(warmup=0.1), run=Run(folder=str(args.run)))
    elif found.state is None:
        raise ValueError(f"{found.folder} has no train/rank0.pt, and so no step to go on from; {MODEL_ONLY}")
    else:
        try:
            cfg = training(found.config, made, {path: s.name for path, s in names.items()}, found.state.max_steps)
        except ValueError as error:
            raise ValueError(f"{error}; {MODEL_ONLY}") from None
        seed, first = found.state.data.get("seed"), next(iter(names.values()))
        data = replace(
            cfg.data,
            paths=args.data_paths or found.paths or cfg.data.paths,
            order_seed=seed if type(seed) is int else cfg.data.order_seed,
        )
        if not data.paths:
            raise ValueError(f"{found.folder} names no token files to go on with; give --data-paths, or else {MODEL_ONLY}")
        dtype = str(found.tensors[f"optim.state.{first.name}.exp_avg"].dtype).removeprefix("torch.")
        optim: Any = replace(cfg.optim, moments=dtype)  # type: ignore[call-arg]
        cfg = replace(cfg, data=data, optim=optim, run=replace(cfg.run, folder=str(args.run)))
    cfg.check()
    return cfg, names


def check_tensors(found: Checkpoint, made: Model, names: Mapping[str, Stored], params_only: bool) -> None:
    """ValueError that names a tensor which is missing, one too many, or of another shape, with both shapes."""
    wanted: dict[str, tuple[int, ...]] = {f"model.{s.name}": tuple(s.shape) for s in names.values()}
    if not params_only:
        wanted |= {f"optim.state.{s.name}.{slot}": tuple(s.shape) for s in names.values() for slot in MOMENTS.values()}
        wanted |= {f"optim.state.{s.name}.step": () for s in names.values()}
    read = {name: x for name, x in found.tensors.items() if name.startswith(("model.", "optim.state.")[: 2 - params_only])}
    if made.tie_embeddings:
        read.pop("model.lm_head.w_out.weight", None)  # the embedding once more
    for name, shape in wanted.items():
        hint = f"; {MODEL_ONLY}" if name.startswith("optim.") else ""
        if name not in read:
            raise ValueError(f"{found.folder} lacks {name} {list(shape)}, which the model of its config.json has{hint}")
        if tuple(read[name].shape) != shape:
            raise ValueError(f"{found.folder}: {name} is {list(read[name].shape)}, and {list(shape)} by its config.json{hint}")
        if not read[name].dtype.is_floating_point:
            raise ValueError(
                f"{found.folder}: {name} is of {str(read[name].dtype).removeprefix('torch.')}, and must be of a float"
            )
    for name in read.keys() - wanted.keys():
        shape = tuple(read[name].shape)
        raise ValueError(f"{found.folder} has {name} {list(shape)}, for which the model of its config.json has no place")


def leaves(
    found: Checkpoint, cfg: Config, names: Mapping[str, Stored], params_only: bool
) -> Iterator[tuple[str, Tensor | Deferred]]:
    """The state as a checkpoint of this package has it; all but its counters are read only when they are written."""
    import torch

    from olmo_fn import tree
    from olmo_fn.checkpoint import Deferred
    from olmo_fn.models.transformer import specs

    shapes = {path: spec.shape for path, spec in tree.items(specs(cfg.model))}

    def turned(path: str, name: Stored, of: str, dtype: torch.dtype) -> Deferred:
        return Deferred(shapes[path], dtype, lambda: name.ours(found.tensors[of].make().to(dtype)))

    if not params_only:
        assert found.state is not None
        yield "step", torch.tensor(found.state.step)
        yield "slots.adamw.count", torch.tensor(updates(found, cfg, names))
        moments = getattr(torch, cfg.optim.moments)  # type: ignore[attr-defined]
        for slot, theirs in MOMENTS.items():
            for path, name in names.items():
                yield (
                    f"slots.{slot}.{path}",
                    turned(path, name._replace(offset=0.0), f"optim.state.{name.name}.{theirs}", moments),
                )
    for path, name in names.items():
        yield f"params.{path}", turned(path, name, f"model.{name.name}", torch.float32)


def updates(found: Checkpoint, cfg: Config, names: Mapping[str, Stored]) -> int:
    """How many updates AdamW has made, which must be as many for all parameters: here they are counted together."""
    counts = {float(found.tensors[f"optim.state.{s.name}.step"].make()): s.name for s in names.values()}
    (number, name), *others = counts.items()
    if others:
        raise ValueError(
            f"{found.folder}: AdamW has made {number:g} updates of {name} and {others[0][0]:g} of {others[0][1]}, and here "
            f"there is one count for all; {MODEL_ONLY}"
        )
    if not number.is_integer() or number < 0:
        raise ValueError(f"{found.folder}: damaged, optim.state.{name}.step is {number:g}, which is no number of updates")
    if not number and getattr(cfg.optim, "first_step_bias", False) and found.state is not None:
        return found.state.step  # OLMo-core does not count then
    return int(number)


def summary(args: FromOlmoCore, found: Checkpoint, cfg: Config) -> str:
    """What was read, and what to type next."""
    from olmo_fn.models.transformer import specs
    from olmo_fn.spec import count

    name = shlex.quote(str(args.run))
    what = f"{name}: {count(specs(cfg.model)):,} parameters"
    if args.params_only:
        other = shlex.quote(f"{args.run}-2")
        train = f"olmo-fn train {name} --run.start-from {name} --run.start-with params --run.folder {other} --data.paths …"
        return f"{what}\ntrain on:      {train}"
    assert found.state is not None
    data, lines = found.state.data, [f"{what}, AdamW's moments, and step {found.state.step} of {cfg.run.steps}"]
    if found.state.max_steps not in (None, cfg.run.steps):
        lines.append(f"steps:         the schedule is of {cfg.run.steps}, OLMo-core's run of {found.state.max_steps}")
    files = f"{len(cfg.data.paths)} token file{'s' * (len(cfg.data.paths) != 1)}"
    lines.append(f"data:          {files} in the order of seed {cfg.data.order_seed}{_order(data, found.state.step)}")
    missing = next((path for path in cfg.data.paths if not Path(path).exists()), None)
    if missing is not None:
        lines.append(
            f"               {missing} is not here: bring it, or change data.paths in {name}/config.yaml before you go on"
        )
    return "\n".join([*lines, f"go on:         olmo-fn train {name}"])


def _order(data: Mapping[str, Any], step: int) -> str:
    """Whether the batches go on where they were."""
    epoch, batches = data.get("epoch"), data.get("batches_processed")
    if (epoch, batches, data.get("dataset_type", "fsl")) == (1, step, "fsl"):
        return f"; the next batch is number {step + 1:,} of epoch 1, as there"
    return f"; OLMo-core was at batch {batches} of epoch {epoch}, and the batches of step {step + 1} may be others"
