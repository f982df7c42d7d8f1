"""``olmo-fn convert from-olmo-core DIR RUN``: a checkpoint of OLMo-core 2.x or 3.x as a run that goes on where it was.

Parameters and AdamW's moments are read tensor by tensor (`olmo_fn.convert.dcp`), the config by
`olmo_fn.convert.olmo_core_config`, and of the trainer's state the step, the length of the run, and where the data were.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import tyro

from olmo_fn.fields import PATH

if TYPE_CHECKING:
    from torch import Tensor

    from olmo_fn.convert.dcp import Stored
    from olmo_fn.models.config import Model
    from olmo_fn.train.config import Config

LARGEST_CONFIG = 16 << 20  # bytes
MOMENTS = {"adamw_m": "exp_avg", "adamw_v": "exp_avg_sq"}
IN_TRAIN_STATE = frozenset(
    {
        *("numpy.ndarray", "numpy.dtype", "_codecs.encode", "builtins.set", "torch.Size", "pathlib.PosixPath"),
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    }
)
"""What the trainer's state may name, besides tensors; these are not read."""


@dataclass(frozen=True)
class FromOlmoCore:
    """A run from a checkpoint of OLMo-core: its model, AdamW's moments, step, schedule, and order of the data."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """A step's folder, or one with several, of which the newest is taken; or what OLMo-core's unshard_checkpoint made."""
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the new run; it must not be there."""
    params_only: bool = False
    """Take the model alone, to begin a training anew: no moments, step, schedule, or data."""
    data_paths: Annotated[tuple[str, ...], PATH] = ()
    """Token files that the run goes on with, in their order; as the checkpoint has them when not given."""
    config: Path | None = None
    """OLMo-core's config.json, where there is none in the folder or above."""


class TrainState(NamedTuple):
    """What is read of a trainer's state; None and empty where there is none."""

    step: int | None = None
    max_steps: int | None = None
    tokens: int | None = None
    data: Mapping[str, Any] = {}


class Checkpoint(NamedTuple):
    """A checkpoint of OLMo-core: its folder, its tensors by name, its config, and its trainer's state."""

    folder: Path
    tensors: dict[str, Stored]
    config: dict[str, Any]
    state: TrainState


def run(args: FromOlmoCore) -> str:
    """Make the run, whole or not at all; what it is, and what to type next. ValueError, in one line, for what is not read."""
    from olmo_fn.convert.run_folder import write_run
    from olmo_fn.train.schedule import sizes

    found = open_checkpoint(args.folder, args.config)
    cfg, names = config_of(found, args)
    step = 0 if args.params_only else found.state.step or 0
    cfg.check()
    state = {} if args.params_only else {"olmo_core": {"step": step, "data": dict(found.state.data)}}
    meta = {"tokens": sizes(cfg).tokens_before(step), **state}
    write_run(cfg, args.run, leaves(found, cfg, names, args.params_only), step, meta)
    return summary(args, found, cfg)


def open_checkpoint(folder: Path, config: Path | None = None) -> Checkpoint:
    """What there is in a folder; no tensor is read yet. ValueError, in one line, for what is no checkpoint, or damaged."""
    folder = newest(folder)
    tensors = open_tensors(folder)
    path = config or next((p for p in (folder / "config.json", folder.parent / "config.json") if p.is_file()), None)
    if path is None:
        raise ValueError(
            f"there is no config.json in {folder} or above it, and only it says what the model is; OLMo-core's ConfigSaverCallback "
            "writes it: name one with --config"
        )
    state = folder / "train" / "rank0.pt"
    return Checkpoint(folder, tensors, read_config(path), read_train_state(state) if state.is_file() else TrainState())


def newest(folder: Path) -> Path:
    """The folder itself, or the newest ``step…`` in it."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is {'no folder' if folder.exists() else 'not there'}; give the folder of a checkpoint")
    inside = [path for path in folder.glob("step*") if path.name[4:].isdecimal() and (path / "model_and_optim").is_dir()]
    return max(inside, key=lambda path: int(path.name[4:]), default=folder)


def open_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors of a checkpoint, sharded or not, as ``model.<name>`` and ``optim.state.<name>.<slot>``."""
    from olmo_fn.convert.dcp import read_metadata
    from olmo_fn.convert.torch_files import read_tensors

    for inside in (folder / "model_and_optim", folder):
        if (inside / ".metadata").is_file():
            return read_metadata(inside)
    whole = sorted((folder / "model").glob("*.safetensors")) or [folder / "model.safetensors"]
    if whole[0].is_file():
        return {f"model.{name}": tensor for path in whole for name, tensor in safetensors(path).items()}
    whole = sorted((folder / "model").glob("*.pt")) or [folder / "model.pt"]
    if whole[0].is_file():
        found = {f"model.{name}": tensor for path in whole for name, tensor in read_tensors(path).items()}
        optim = folder / "optim.pt"
        return found | ({f"optim.{name}": tensor for name, tensor in read_tensors(optim).items()} if optim.is_file() else {})
    raise ValueError(
        f"{folder} is no checkpoint of OLMo-core: it has no model_and_optim/.metadata, no .metadata, no step… with one, and no "
        "model.safetensors or model.pt"
    )


def safetensors(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file."""
    from olmo_fn.convert.dcp import Stored
    from olmo_fn.convert.tensors import read_header

    def read(tensor: Any) -> Tensor:
        import torch

        out = torch.empty(tensor.shape, dtype=tensor.dtype)
        for first, rows in tensor.rows():
            (out if out.ndim else out[None])[first : first + len(rows)] = rows
        return out

    return {name: Stored(tensor.dtype, tensor.shape, partial(read, tensor)) for name, tensor in read_header(path).items()}


def read_config(path: Path) -> dict[str, Any]:
    """OLMo-core's config.json; ValueError for what is no JSON object."""
    try:
        with path.open(encoding="utf-8") as file:
            found = json.loads(file.read(LARGEST_CONFIG))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON ({type(error).__name__}); it must be the config.json that OLMo-core writes") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: it must be a JSON object with model, dataset, train_module, …")
    return found


def read_train_state(path: Path) -> TrainState:
    """What is read of ``train/rank0.pt``, by the reader of pickles that builds nothing."""
    from olmo_fn.convert.torch_files import IN_TENSORS, Place, TorchFile

    with TorchFile(Place(path, 0, path.stat().st_size)) as file:
        state = file.pickle(IN_TENSORS | IN_TRAIN_STATE)
    if type(state) is not dict:
        raise ValueError(f"{path}: it holds no state of a trainer")
    data = state.get("data_loader", state.get("dataset"))
    kept = {str(key): value for key, value in data.items() if type(value) in (int, str)} if type(data) is dict else {}
    numbers = [state.get(name) for name in ("global_step", "max_steps", "global_train_tokens_seen")]
    if type(numbers[0]) is not int or not all(value is None or (type(value) is int and 0 <= value < 1 << 53) for value in numbers):
        raise ValueError(f"{path}: damaged, its global_step, max_steps and global_train_tokens_seen are no numbers of a run")
    return TrainState(*numbers, kept)


def config_of(found: Checkpoint, args: FromOlmoCore) -> tuple[Config, dict[str, Any]]:
    """The config of the run, and how the checkpoint has each parameter, by path. ValueError for what does not fit."""
    from olmo_fn.convert.names import stored
    from olmo_fn.convert.olmo_core_config import model, training
    from olmo_fn.train.config import Config, Run

    made = model(found.config)
    names = stored(made, "olmo_core")
    check_tensors(found, made, names, args.params_only)
    if args.params_only:
        return Config(made, run=Run(folder=str(args.run))), names
    if found.state.step is None:
        raise ValueError(f"{found.folder} has no train/rank0.pt, and so no step to go on from; --params-only takes the model alone")
    try:
        cfg = training(found.config, made, {path: s.name for path, s in names.items()}, found.state.max_steps)
    except ValueError as error:
        raise ValueError(f"{error}; --params-only takes the model alone") from None
    listed = found.folder / "data_paths.txt"
    paths = args.data_paths or (tuple(listed.read_text(errors="replace").split("\n")) if listed.is_file() else cfg.data.paths)
    seed = found.state.data.get("seed")
    data = replace(cfg.data, paths=paths, order_seed=seed if type(seed) is int else cfg.data.order_seed)
    dtype = found.tensors[f"optim.state.{next(iter(names.values())).name}.exp_avg"].dtype
    optim = replace(cfg.optim, moments=str(dtype).removeprefix("torch."))  # type: ignore[call-arg]
    return replace(cfg, data=data, optim=optim, run=replace(cfg.run, folder=str(args.run))), names


def check_tensors(found: Checkpoint, made: Model, names: Mapping[str, Any], params_only: bool) -> None:
    """ValueError that names a tensor which is missing, one too many, or of another shape, with both shapes."""
    wanted = {f"model.{s.name}": tuple(s.shape) for s in names.values()}
    known = set(wanted)
    if made.tie_embeddings:
        known.add("model.lm_head.w_out.weight")
    if not params_only:
        wanted |= {f"optim.state.{s.name}.{slot}": tuple(s.shape) for s in names.values() for slot in MOMENTS.values()}
        wanted |= {f"optim.state.{s.name}.step": () for s in names.values()}
    for name, shape in wanted.items():
        there = found.tensors.get(name)
        hint = "; --params-only takes the model alone" if name.startswith("optim.") else ""
        if there is None:
            raise ValueError(f"{found.folder} lacks {name} {list(shape)}, which the model in config.json has{hint}")
        if there.shape != shape:
            raise ValueError(f"{found.folder}: {name} is {list(there.shape)}, and {list(shape)} in the model of config.json{hint}")
        if not there.dtype.is_floating_point:
            raise ValueError(f"{found.folder}: {name} is of {there.dtype}, which is no parameter's or moment's")
    for name, there in found.tensors.items():
        extra = name not in known if name.startswith("model.") else name.startswith("optim.state.") and name not in wanted
        if extra and not (params_only and not name.startswith("model.")):
            raise ValueError(f"{found.folder} has {name} {list(there.shape)}, for which the model in config.json has no place")


def leaves(found: Checkpoint, cfg: Config, names: Mapping[str, Any], params_only: bool) -> Iterator[tuple[str, Tensor]]:
    """The state as a checkpoint of this package has it, leaf after leaf; each is read when its turn comes."""
    import torch

    if not params_only:
        yield "step", torch.tensor(found.state.step)
        yield "slots.adamw.count", torch.tensor(count(found, cfg, names))
    for path, s in names.items():
        yield f"params.{path}", s.ours(found.tensors[f"model.{s.name}"].read().float())
    moments = {} if params_only else MOMENTS
    for slot, name in moments.items():
        for path, s in names.items():
            yield f"slots.{slot}.{path}", s._replace(offset=0.0).ours(found.tensors[f"optim.state.{s.name}.{name}"].read())


def count(found: Checkpoint, cfg: Config, names: Mapping[str, Any]) -> int:
    """AdamW's count of the updates that it has made, which must be one for all parameters."""
    counts = {float(found.tensors[f"optim.state.{s.name}.step"].read()): s.name for s in names.values()}
    (number, name), *others = counts.items()
    if others:
        raise ValueError(
            f"AdamW has made {number:g} updates of {name} and {others[0][0]:g} of {others[0][1]}, and counts them together here; "
            "--params-only takes the model alone"
        )
    if not number.is_integer() or number < 0:
        raise ValueError(f"{found.folder}: optim.state.{name}.step is {number:g}, which is no number of updates")
    return int(number) or (found.state.step if getattr(cfg.optim, "first_step_bias", False) else 0) or 0


def summary(args: FromOlmoCore, found: Checkpoint, cfg: Config) -> str:
    """What was read, and what to type next."""
    from olmo_fn.models.transformer import specs
    from olmo_fn.spec import count

    name = shlex.quote(str(args.run))
    lines = [f"{found.folder}: a model of {count(specs(cfg.model)):,} parameters"]
    if args.params_only:
        other = shlex.quote(f"{args.run}-2")
        train = f"olmo-fn train {name} --run.start-from {name} --run.start-with params --run.folder {other} --data.paths …"
        return "\n".join([*lines, f"train it:  {train}"])
    state, data = found.state, found.state.data
    lines[0] += f", AdamW's moments, step {state.step} of {cfg.run.steps}"
    lines.append(f"data:      {len(cfg.data.paths)} token files in the order of seed {cfg.data.order_seed}{_place(found, cfg)}")
    if state.max_steps not in (None, cfg.run.steps):
        lines.append(f"schedule:  it is of {cfg.run.steps} steps; OLMo-core's run ends after {state.max_steps}")
    lines.append(f"go on:     olmo-fn train {name}")
    return "\n".join(lines)
