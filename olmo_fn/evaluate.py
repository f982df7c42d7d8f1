"""``olmo-fn evaluate RUN FILES…``: the loss of a trained model on texts: of a token, as perplexity, and of a byte."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from olmo_fn.data.tokens import Dtype
from olmo_fn.fields import PATH, Range
from olmo_fn.train.observers.jsonl import to_json

if TYPE_CHECKING:
    from olmo_fn.data.heldout import TokenSet
    from olmo_fn.train.evals import Heldout
    from olmo_fn.train.session import Session

TOKEN_FILES = (".npy", ".bin")


@dataclass(frozen=True)
class Evaluate:
    """Print the loss of a trained model on texts: of a token, as perplexity, and of a byte."""

    run: Annotated[tyro.conf.Positional[str], PATH, tyro.conf.arg(metavar="RUN")]
    """Folder of a run, or one of its checkpoints."""
    files: Annotated[tyro.conf.Positional[tuple[str, ...]], PATH, tyro.conf.arg(metavar="FILE")] = ()
    """Token files (.npy, .bin), text, jsonl and parquet files, or globs. Each is a set by itself; NAME=FILE puts it into the
    set NAME. Without any: what the run holds out."""
    mask_paths: Annotated[tuple[str, ...], PATH] = ()
    """For each token file a label mask, one byte a token; the prediction of a 0 is not in the loss."""
    weights: Literal["params", "ema", "merge"] = "params"
    """The weights; or their moving average, or the mean of the last steps, if the run kept one."""
    step: Annotated[int | None, Range()] = None
    """Take the checkpoint of this step instead of the newest whole one."""
    tokens: int = 0
    """At most so many tokens of each set. 0: all of a file; of what the run holds out, as many as the run read."""
    dtype: Dtype = "auto"
    """Integer type of the token files. auto: as the tokenizing command wrote beside them, or else the smallest that holds the
    vocabulary."""
    text_field: str = "text"
    """Field or column of the text in jsonl and parquet files."""
    json: bool = False
    """Print a line of JSON for each set instead of a table."""
    threads: Annotated[int, Range(0, 1024)] = 0
    """CPU threads; 0: as many as the run was told."""
    device: str = "auto"
    """Device to run on: auto takes cuda when there is one."""


def evaluate(args: Evaluate, show: bool = True) -> tuple[Path, dict[str, Heldout]]:
    """The checkpoint, and the loss on each set of which something is predicted, to the bit as the run itself finds it."""
    import torch

    from olmo_fn.progress import progress
    from olmo_fn.train.machine import pick_device
    from olmo_fn.train.session import load_parameters

    session, params, path = load_parameters(args.run, step=args.step, weights=args.weights, device=pick_device(args.device))
    if threads := args.threads or session.cfg.run.threads:
        torch.set_num_threads(threads)
    found = {}
    sets, score = _opened(session, args) if args.files else _held_out(session, args)
    for name, tokens in sets.items():
        with progress(name, len(tokens) if tokens.mask is None else int(tokens.mask.sum()), show) as advance:
            found[name] = score(params, tokens, advance)
    return path, {name: loss for name, loss in found.items() if loss}


Score = Callable[..., "Heldout | None"]


def _held_out(session: Session, args: Evaluate) -> tuple[Mapping[str, TokenSet], Score]:
    """What the run holds out, and how to find the loss on it."""
    source = session.source
    if not source.heldout:
        raise ValueError(f"{args.run} holds out nothing; name files to evaluate on")
    sets = {name: found.first(args.tokens or session.cfg.run.eval_tokens) for name, found in source.heldout.items()}
    return sets, lambda params, tokens, show: session.evaluate_tokens(params, tokens, source.tokenizer, source.eos_id, show)


def _opened(session: Session, args: Evaluate) -> tuple[Mapping[str, TokenSet], Score]:
    """The sets that the files are, and how to find the loss on them; the run's training data may be gone."""
    import numpy as np

    from olmo_fn.data.documents import chunks, documents
    from olmo_fn.data.heldout import TokenSet, by_name, named
    from olmo_fn.data.inputs import expand as expand_texts
    from olmo_fn.data.meta import check_vocabulary, metas_beside
    from olmo_fn.data.source import eos_id_of, masked, open_files
    from olmo_fn.data.tokens import HELDOUT_FILE, check_vocab, expand, smallest_dtype

    cfg, words = session.cfg, [named(word, word) for word in args.files]
    has_text = any(not path.endswith(TOKEN_FILES) for _, path in words)
    has_own = cfg.data.tokenizer or (session.folder / "tokenizer.json").is_file()
    tokenizer = session.tokenizer if has_text or has_own else None
    vocab_size = tokenizer.vocab_size if tokenizer else cfg.model.vocab_size
    pattern = [(name, path) for name, path in words if path.endswith(TOKEN_FILES)]
    paths = [(name, path) for name, one in pattern for path in expand((one,), HELDOUT_FILE)]
    metas = metas_beside(path for _, path in paths)
    check_vocabulary(metas, tokenizer, f"of {args.run}")
    files = open_files([path for _, path in paths], args.dtype, vocab_size, metas)
    check_vocab(files, vocab_size)
    pairs = list(zip((name for name, _ in paths), masked(files, args.mask_paths, metas), strict=True))
    for name, path in words:
        if tokenizer and not path.endswith(TOKEN_FILES):
            texts = [
                text for chunk in chunks(expand_texts((path,)).files) for text in documents(chunk, args.text_field) if text
            ]
            ids = np.concatenate([np.zeros(0, np.int64), *tokenizer.encode_documents(texts)])
            num_bytes = sum(len(text.encode()) for text in texts)
            pairs.append((name, TokenSet(ids.astype(smallest_dtype(vocab_size)), text_bytes=num_bytes)))
    sets, eos_id = by_name(pairs), eos_id_of(cfg.data, tokenizer, next(iter(metas.items()), None), vocab_size)
    if args.tokens:
        sets = {name: found.first(args.tokens) for name, found in sets.items()}
    return sets, lambda params, tokens, show: session.evaluate_tokens(params, tokens, tokenizer, eos_id, show)


def table(found: Mapping[str, Heldout]) -> str:
    """A line for each set.

    >>> from olmo_fn.train.evals import Heldout
    >>> print(table({"web": Heldout(2.5, 4096, 1.25), "code": Heldout(0.5, 100)}))
    set   tokens    loss  perplexity  bits per byte
    web    4,096  2.5000       12.18         1.2500
    code     100  0.5000        1.65              ?
    """
    wide = max(3, *map(len, found))
    most = max(6, *(len(f"{x.tokens:,}") for x in found.values()))
    lines = [f"{'set':<{wide}}  {'tokens':>{most}}    loss  perplexity  bits per byte"]
    for name, x in found.items():
        bits = "?" if x.bits_per_byte is None else f"{x.bits_per_byte:.4f}"
        perplexity = f"{x.perplexity:.{2 if x.perplexity < 1e6 else 0}f}"
        lines.append(f"{name:<{wide}}  {x.tokens:>{most},}  {x.loss:6.4f}  {perplexity:>10}  {bits:>13}")
    return "\n".join(lines)


def run(args: Evaluate) -> str:
    """What the command prints. ValueError when nothing is predicted of any set."""
    path, found = evaluate(args)
    if not found:
        raise ValueError("nothing is predicted: the sets are empty, masked, or of one token without anything before it")
    if args.json:
        of = {"checkpoint": str(path), "weights": args.weights}
        lines = (to_json({"set": name, **of, **x._asdict(), "perplexity": x.perplexity}) for name, x in found.items())
        return "".join(lines).removesuffix("\n")
    return f"{path}{'' if args.weights == 'params' else f', {args.weights}'}\n{table(found)}"


if __name__ == "__main__":  # as version 0.1 called it
    raise SystemExit("the command is: olmo-fn evaluate")
