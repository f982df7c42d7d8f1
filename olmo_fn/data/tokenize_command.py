"""The command ``olmo-fn tokenize``: write token files, and say what they hold and how to train on them."""

from __future__ import annotations

import glob
import os
import shlex
from itertools import chain, count
from pathlib import Path
from typing import Any

from olmo_fn.data.encode import NO_TEXT
from olmo_fn.data.tokenize import REPORT, Tokenize, mask_name, tokenize
from olmo_fn.data.tokens import HELDOUT_FILE


def train_command(config: Tokenize, meta: dict[str, Any]) -> str:
    """The command that trains on the token files, in a folder that is not there yet."""
    output = Path(os.path.expanduser(config.output))
    name = output.resolve().name or "tokens"
    folders = chain([f"runs/{name}"], (f"runs/{name}-{i}" for i in count(2)))
    flags = {
        "--data.paths": str(Path(glob.escape(str(output)), "part-*.npy")),
        "--data.tokenizer": str(output / "tokenizer.json"),
        "--run.folder": next(folder for folder in folders if not os.path.lexists(folder)),
    }
    if config.eos:
        flags["--data.eos"] = config.eos
    if meta["heldout"]["tokens"]:
        flags["--data.heldout-paths"] = str(output / HELDOUT_FILE)
    if config.chat_template:
        flags["--data.label-mask-paths"] = str(Path(glob.escape(str(output)), "mask-*.npy"))
        if meta["heldout"]["tokens"]:
            flags["--data.heldout-mask-paths"] = str(output / mask_name(HELDOUT_FILE))
        flags |= {"--data.instances.name": "packed", "--data.boundaries": "metadata"}
    if meta["vocab_size"] != Tokenize.vocab_size:  # that of the preset
        flags["--model.vocab-size"] = str(meta["vocab_size"])
    return "python train.py olmo2-tiny " + " ".join(
        f"{flag} {shlex.quote(value)}" for flag, value in (flags | _small(meta)).items()
    )


def _small(meta: dict[str, Any]) -> dict[str, str]:
    """Flags for text that is too short for four sequences of 256 tokens, the preset's batch, beside what is held out."""
    parts = [count["tokens"] for name, count in meta["files"].items() if name != HELDOUT_FILE]
    for length in (256, 64, 16, 4, 2):
        windows = sum(tokens // length for tokens in parts) - (not meta["heldout"]["tokens"])
        if windows >= 4:
            break
    flags = {"--recipe.sequence-length": str(length)} if length < 256 else {}
    return flags | ({"--recipe.batch-size": str(max(1, windows))} if windows < 4 else {})


def summary(config: Tokenize, meta: dict[str, Any]) -> str:
    """How much was written, and why nothing was held out where nothing was."""
    line = "{}: {documents:,} documents, {bytes:,} bytes, {tokens:,} tokens"
    lines = [line.format(side, **meta[side]) for side in ("train", "heldout")]
    if not meta["heldout"]["documents"]:
        n = meta["train"]["documents"]
        why = f"none of {n:,} was drawn at --heldout {config.heldout:g}" if config.heldout else "as --heldout 0 asks"
        more = f"--heldout {max(2 * config.heldout, 10 / n):.1g} or " if n > 20 else ""
        lines[1] = f"heldout: 0 documents ({why}): training holds out its last tokens; to choose: {more}--heldout-inputs FILES"
    if meta["skipped"]:
        field = "messages" if config.chat_template and config.text_field == Tokenize.text_field else config.text_field
        lines.append(f"passed over: {meta['skipped']:,} without a text in {field!r}")
    if others := [f"{n:,} {reason}" for reason, n in meta["dropped"].items() if reason != NO_TEXT]:
        report = f" ({REPORT} says what)" if any(reason.startswith("evaluation set") for reason in meta["dropped"]) else ""
        lines.append(f"left out: {', '.join(others)}{report}")
    if short := meta.get("short_evaluation_texts"):
        lines.append(f"not looked for: {short:,} texts of evaluation sets that are shorter than {config.ngram} words")
    return "\n".join(lines)


def run(config: Tokenize) -> int:
    """The command: write the token files, and say what they hold and how to train on them."""
    meta = tokenize(config, say=print)
    print(summary(config, meta))
    print(train_command(config, meta))
    return 0
