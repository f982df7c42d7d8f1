"""``olmo-fn convert``: a run from the weights of other programs, and these from a run. Here those of Hugging Face."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from olmo_fn.convert.gguf import FromGGUF, ToGGUF, from_gguf, to_gguf
from olmo_fn.convert.olmo_core import FromOlmoCore, from_olmo_core
from olmo_fn.convert.upcycle import Upcycle, upcycle


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
    from olmo_fn.convert.run import check_new, write_run
    from olmo_fn.formats.huggingface import READ, open_directory
    from olmo_fn.models.count import in_words

    check_new(args.run)
    directory = open_directory(args.directory)
    dtype = READ[directory.dtype]
    meta = {"converted": str(args.directory.resolve()), "dtype": dtype}
    said = write_run(args.directory, args.run, directory.parameter, dtype, meta)
    print(f"{args.run}: {directory.raw['architectures'][0]}, {in_words(directory.model)}, from {dtype}")
    print(said)
    return 0


def to_hf(args: ToHF) -> int:
    """Make the directory, whole or not at all; 1 when it is to be verified, and is not the same model."""
    import sys

    import torch

    from olmo_fn.formats.verify import check_transformers, compare
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
    "from-gguf": (FromGGUF, from_gguf),
    "to-gguf": (ToGGUF, to_gguf),
    "from-olmo-core": (FromOlmoCore, from_olmo_core),
    "upcycle": (Upcycle, upcycle),
}
"""What can be converted: the settings of each direction, and what carries it out."""
