"""``olmo-fn convert from-hf DIR RUN`` and ``to-hf RUN DIR``: from a Hugging Face directory, and to one."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from olmo_fn.convert.olmo_core import FromOlmoCore, from_olmo_core

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FromHF:
    """Make a run of a Hugging Face directory: one checkpoint in fp32, with its tokenizer. A tensor at a time is in memory."""

    directory: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """Directory with config.json and safetensors files."""
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder for the run; it must not be there."""


@dataclass(frozen=True)
class ToHF:
    """Make a Hugging Face directory of a run's model, which transformers loads. A tensor at a time is in memory."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of a run, or one of its checkpoints; adapters are merged into the model."""
    directory: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """Directory to be made; it must not be there, or be empty."""
    step: int | None = None
    """Take the checkpoint of this step instead of the newest whole one."""
    weights: Literal["params", "ema", "merge"] = "params"
    """The weights; or their moving average, or the mean of the last steps, if the run kept one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights there; auto: what they came in from a Hugging Face directory, or else float32."""
    verify: bool = False
    """Load the directory with transformers as well, and compare logits. Both models are then in memory, in fp32."""


def from_hf(args: FromHF) -> int:
    """Make the run, whole or not at all, and say what to type next."""
    import torch

    from olmo_fn import tree
    from olmo_fn.checkpoint import Deferred, save
    from olmo_fn.convert.huggingface import READ, open_directory
    from olmo_fn.convert.text_files import keep
    from olmo_fn.models import transformer
    from olmo_fn.progress import progress
    from olmo_fn.spec import Spec
    from olmo_fn.train.config import Init
    from olmo_fn.train.finetune import finetuning
    from olmo_fn.train.folder import write_config

    source, run = args.directory, args.run
    if run.exists():
        raise ValueError(f"{run} is there already; choose another folder for the run")
    directory, cfg = open_directory(source), finetuning(source)
    own = str(run / "tokenizer.json") if cfg.data.tokenizer else ""
    cfg = replace(cfg, init=Init(), run=replace(cfg.run, folder=str(run)), data=replace(cfg.data, tokenizer=own))
    specs = transformer.specs(directory.model)
    count = sum(spec.size for _, spec in tree.items(specs))
    run.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=f".{run.name}-", dir=run.parent) as beside,
        progress("reading", count) as advance,
    ):

        def make(path: str, size: int) -> Tensor:
            advance(size, path)
            return directory.parameter(path)

        def deferred(path: str, spec: Spec) -> Any:
            return Deferred(spec.shape, torch.float32, partial(make, path, spec.size))

        draft = Path(beside) / "run"
        write_config(cfg, draft)
        if own:
            shutil.copyfile(source / "tokenizer.json", draft / "tokenizer.json")
        keep(source, draft, READ[directory.dtype])
        meta = {"converted": str(source.resolve()), "dtype": READ[directory.dtype]}
        save({"params": tree.map_with_path(deferred, specs)}, draft / "checkpoints", step=0, meta=meta, threads=1)
        draft.rename(run)
    name = shlex.quote(str(run))
    print(f"{run}: {directory.raw['architectures'][0]}, {count:,} parameters, from {READ[directory.dtype]}")
    if own:
        print(f"sample:        olmo-fn generate {name} 'The '")
    start = f"--run.start-from {name} --run.start-with params --run.folder {name}-2"
    print(f"train on:      olmo-fn train {name} {start} --data.paths 'tokens/part-*.npy'")
    return 0


def to_hf(args: ToHF) -> int:
    """Make the directory, whole or not at all; 1 when it is to be verified, and is not the same model."""
    import sys

    import torch

    from olmo_fn.convert.verify import check_transformers, compare
    from olmo_fn.models.count import num_params
    from olmo_fn.progress import progress
    from olmo_fn.train.export import write_checkpoint
    from olmo_fn.train.process import ProcessContext
    from olmo_fn.train.session import find_run, open_run

    if args.verify:
        check_transformers()
    folder, checkpoint = find_run(args.run, args.step)
    session = open_run(folder, ProcessContext(torch.device("cpu")))
    bar = partial(progress, "writing", num_params(session.cfg.model))

    def write(path: Path) -> str:
        with bar() as advance:
            return write_checkpoint(session, path, args.directory, args.dtype, args.weights, lambda size: advance(size))

    found = session.find(checkpoint or folder, write, on_skip=lambda line: print(line, file=sys.stderr))
    if found is None:
        raise ValueError(f"{args.run} holds no whole checkpoint; one is written every --run.checkpoint-every steps")
    step = found[0].name.removeprefix("step")
    print(f"{args.directory}: the {args.weights} of {args.run} after step {step}, in {found[1]}")
    if not args.verify:
        return 0
    said, same = compare(args.directory)
    print(said)
    return 0 if same else 1


DIRECTIONS: dict[str, tuple[type, Any]] = {
    "from-hf": (FromHF, from_hf),
    "to-hf": (ToHF, to_hf),
    "from-olmo-core": (FromOlmoCore, from_olmo_core),
}
"""What can be converted: the settings of each direction, and what carries it out."""
