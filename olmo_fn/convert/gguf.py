"""``olmo-fn convert from-gguf FILE RUN`` and ``to-gguf RUN FILE``: from a file of llama.cpp, and to one."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from olmo_fn.formats.gguf_file import File
    from olmo_fn.formats.gguf_tokenizer import Described
    from olmo_fn.train.session import Session


@dataclass(frozen=True)
class FromGGUF:
    """Make a run of a GGUF file: one checkpoint in fp32, with its tokenizer. A tensor at a time is in memory."""

    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """File of llama.cpp, in any quantisation that the package gguf reads."""
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder for the run; it must not be there."""


@dataclass(frozen=True)
class ToGGUF:
    """Make a GGUF file of a run's model, which llama.cpp loads. A tensor at a time is in memory."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of a run, or one of its checkpoints; adapters are merged into the model."""
    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """File to be made; it must not be there."""
    step: int | None = None
    """Take the checkpoint of this step instead of the newest whole one."""
    weights: Literal["params", "ema", "merge"] = "params"
    """The weights; or their moving average, or the mean of the last steps, if the run kept one."""
    dtype: Literal["f32", "f16", "q8_0"] = "f16"
    """What matrices are kept as; vectors are fp32. q8_0 has 8 bits a number, and a scale for each 32 of a row; a matrix whose
    rows are no multiple of 32 is f16."""
    tokenizer: bool = True
    """Write the tokenizer and the chat template too."""


def from_gguf(args: FromGGUF) -> int:
    """Make the run, whole or not at all, and say what to type next."""
    from olmo_fn.convert.run import check_new, write_run
    from olmo_fn.formats.gguf_file import open_gguf
    from olmo_fn.models.count import num_params

    check_new(args.run)
    file = open_gguf(args.file)
    with tempfile.TemporaryDirectory() as folder:
        without = write_texts(file, Path(folder))
        meta = {"converted": str(args.file.resolve()), "types": file.types}
        said = write_run(Path(folder), args.run, file.parameter, "float32", meta)
    print(f"{args.run}: {file.arch}, {num_params(file.model):,} parameters, from {', '.join(file.types)}")
    if without:
        print(f"{args.file}: {without}; the run has none, --data.tokenizer names another", file=sys.stderr)
    print(said)
    return 0


def write_texts(file: File, folder: Path) -> str:
    """What a Hugging Face directory of the model has beside weights; why there is no tokenizer, if there is none."""
    from olmo_fn.formats.config_json import json_of, write_json
    from olmo_fn.formats.gguf_tokenizer import TEMPLATE, rebuilt, special_tokens

    metadata = file.metadata
    ids, context = special_tokens(metadata), metadata.get(f"{file.arch}.context_length")
    numbers = {f"{name}_token_id": ids.get(name) for name in ("bos", "eos", "pad")}
    write_json(folder / "config.json", {**json_of(file.model), **numbers, "max_position_embeddings": context})
    try:
        text = rebuilt(metadata)
    except ValueError as error:
        return str(error)
    tokens = metadata["tokenizer.ggml.tokens"]
    names = {f"{name}_token": tokens[number] for name, number in ids.items() if 0 <= number < len(tokens)}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    write_json(folder / "tokenizer_config.json", settings | ({"model_max_length": context} if context else {}))
    write_json(folder / "generation_config.json", {name: number for name, number in numbers.items() if number is not None})
    if isinstance(template := metadata.get(TEMPLATE), str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return ""


def to_gguf(args: ToGGUF) -> int:
    """Make the file, whole or not at all."""
    import torch

    from olmo_fn.formats.gguf_file import write_gguf
    from olmo_fn.formats.text_files import config_of
    from olmo_fn.models.count import num_params
    from olmo_fn.progress import progress
    from olmo_fn.train.process import ProcessContext
    from olmo_fn.train.session import find_run, open_run

    folder, checkpoint = find_run(args.run, args.step)
    session = open_run(folder, ProcessContext(torch.device("cpu")))
    described = tokenizer_keys(session, args.tokenizer)
    model, length = session.cfg.model, session.cfg.recipe.sequence_length
    context = config_of(model, folder, length, None).get("max_position_embeddings") or length
    bar = partial(progress, "writing", num_params(model))

    def write(path: Path) -> None:
        with bar() as advance:
            parameters = session.stream_model(path, args.weights)
            write_gguf(args.file, model, parameters, args.dtype, context, described.metadata, lambda size: advance(size))

    found = session.find(checkpoint or folder, write, on_skip=lambda line: print(line, file=sys.stderr))
    if found is None:
        raise ValueError(f"{args.run} holds no whole checkpoint; one is written every --run.checkpoint-every steps")
    step, size = found[0].name.removeprefix("step"), args.file.stat().st_size
    print(f"{args.file}: the {args.weights} of {args.run} after step {step}, in {args.dtype}, {size:,} bytes")
    if described.note:
        print(described.note, file=sys.stderr)
    return 0


def tokenizer_keys(session: Session, wanted: bool) -> Described:
    """The keys of the run's tokenizer and chat template, from the files that it came with, if they are of its tokenizer."""
    from olmo_fn.formats.gguf_tokenizer import KEY, SPECIAL, Described, describe
    from olmo_fn.formats.text_files import KEPT, chat_template, named_tokens, same_tokenizer

    run, cfg = session.folder, session.cfg
    none: Mapping[str, Any] = {f"{KEY}model": "none"}
    if not wanted:
        return Described(dict(none))
    if not (run / "tokenizer.json").is_file() and not cfg.data.tokenizer:
        return Described(dict(none), f"{run} has no tokenizer, and so the file has none")
    kept, tokenizer = run / KEPT, session.tokenizer
    special, template, text = {}, chat_template(run), tokenizer.backend.to_str()
    if same_tokenizer(kept, tokenizer):
        names = named_tokens(kept)
        special = {name: names[f"{name}_token"] for name in SPECIAL if f"{name}_token" in names}
        template = template or chat_template(kept)
        if (kept / "tokenizer.json").is_file():
            text = (kept / "tokenizer.json").read_text(encoding="utf-8")
    return describe(text, cfg.model.vocab_size, special, tokenizer.eos_id, template)
