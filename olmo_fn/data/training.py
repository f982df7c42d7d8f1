"""From token files to the batches of a run: instances of each source, what is held out of them, and the order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from olmo_fn.data.heldout import TokenSet, joined
from olmo_fn.data.instances import Instances, TokenData
from olmo_fn.data.instances.documents import MaskedDocuments
from olmo_fn.data.instances.filtered import Filtered
from olmo_fn.data.instances.operators import Concatenated, Slice
from olmo_fn.data.instances.variable import BucketLoader, Buckets
from olmo_fn.data.loader import Loader
from olmo_fn.data.mix import Mix
from olmo_fn.data.mixing import MixPhase, Mixture
from olmo_fn.data.settings import Data
from olmo_fn.data.sizes import Sizes
from olmo_fn.data.tokens import smallest_dtype

HELDOUT = "heldout"  # the name of the set whose files have none of their own
HELDOUT_TOKENS = 1 << 22  # the most that a fraction of the data holds out


@dataclass(frozen=True)
class Training:
    """What a run trains on, and what is held out of it."""

    loader: Loader | BucketLoader
    heldout: Mapping[str, TokenSet]
    """Empty unless it was asked for; of a mixture a set for each source."""


def training(data: Data, tokens: TokenData, sizes: Sizes, hold_out: bool) -> Training:
    """The batches of all files as one source; ``hold_out`` its last instances, a part of ``data.heldout_fraction``."""
    instances: Instances = data.instances.build(tokens)
    if isinstance(instances, Buckets):
        if data.mask_documents or data.filter.max_count:
            raise ValueError(
                "--data.mask-documents and --data.filter are not for --data.instances.name variable: rows are documents"
            )
        count = _held_out(len(instances), data, sizes) if hold_out else 0
        loader: Loader | BucketLoader = instances.loader(sizes, data.order_seed, len(instances) - count)
    else:
        instances = _finished(instances, data, tokens)
        count = _held_out(len(instances), data, sizes) if hold_out else 0
        loader = Loader(instances, sizes, data.order_seed, len(instances) - count, data.order)
    return Training(loader, {HELDOUT: _last(instances, count, tokens.vocab_size)} if count else {})


def mixed(data: Data, tokens: TokenData, mix: Mix, counts: Sequence[int], sizes: Sizes, steps: int, hold_out: bool) -> Training:
    """The batches of several sources, of which source i has the next ``counts[i]`` files, in a run of ``steps``."""
    parts: list[Slice] = []
    heldout: dict[str, TokenSet] = {}
    for source, files, masks in zip(mix.sources, _shared(tokens.files, counts), _shared(tokens.masks, counts), strict=True):
        part = replace(tokens, files=files, masks=masks)
        built = data.instances.build(part)
        if isinstance(built, Buckets):
            raise ValueError(
                "--data.instances.name variable has an order of its own, and cannot be mixed; leave out --data.mix"
            )
        instances = _finished(built, data, part)
        usable = int(len(instances) * source.max_fraction)
        count = _held_out(usable, data, sizes) if hold_out and usable else 0
        if usable - count < 1:
            raise ValueError(
                f"the source {source.name!r} of --data.mix has no instance of {sizes.window:,} tokens to train on: its files "
                f"{', '.join(f.path for f in files[:2])} have {sum(f.num_tokens for f in files):,} tokens"
            )
        if count:
            heldout[source.name] = _last(Slice(instances, 0, usable), count, tokens.vocab_size)
        parts.append(Slice(instances, 0, usable - count))
    everything = Concatenated(tuple(parts))
    if mix.ratios is None:
        return Training(Loader(everything, sizes, data.order_seed, len(everything), data.order), heldout)
    starts = [(int(at) if at >= 1 else int(at * steps), ratios) for at, ratios in ((0, mix.ratios), *mix.schedule)]
    phases = tuple(MixPhase(sizes.first_window(step), ratios) for step, ratios in starts)
    mixture = Mixture(tuple(map(len, parts)), phases, data.order_seed)
    check_enough(mix, mixture, sizes, steps)
    return Training(Loader(everything, sizes, data.order_seed, len(everything), data.order, mixture), heldout)


def check_enough(mix: Mix, mixture: Mixture, sizes: Sizes, steps: int) -> None:
    """ValueError if a source would be repeated more often than it may be, with how much of it is missing."""
    needed = mixture.counts(sizes.first_window(steps))
    for source, n, size in zip(mix.sources, needed.tolist(), mixture.sizes, strict=True):
        if (missing := n - int(size * source.max_repetition)) > 0:
            raise ValueError(
                f"{steps:,} steps need {n * sizes.window:,} tokens of {source.name!r}, which has {size * sizes.window:,} in "
                f"instances, used at most {source.max_repetition:g} times: {missing * sizes.window:,} are missing; more files, "
                f"a max_repetition of {n / size:.3g}, a smaller ratio, or fewer --run.steps"
            )


def _finished(instances: Instances, data: Data, tokens: TokenData) -> Instances:
    if data.filter.max_count:
        instances = Filtered(instances, data.filter)
    if data.mask_documents and tokens.eos_id is not None:
        instances = MaskedDocuments(instances, tokens.eos_id, tokens.bos_id)
    return instances


def _held_out(have: int, data: Data, sizes: Sizes) -> int:
    """How many instances: a part of those that there are, at least one, and no more than 4 Mi tokens."""
    most = max(1, HELDOUT_TOKENS // sizes.window)
    return min(have, max(1, int(have * data.heldout_fraction)), most)


def _shared(files: Sequence, counts: Sequence[int]) -> Iterator[tuple]:
    """The files of each source; of no files none."""
    at = 0
    for count in counts:
        yield tuple(files[at : at + count])
        at += count


def _last(instances: Instances, count: int, vocab_size: int) -> TokenSet:
    """The tokens of the last ``count`` instances with their label masks, a few instances at a time in memory as int64."""
    dtype = smallest_dtype(vocab_size)

    def read(numbers: np.ndarray) -> TokenSet:
        arrays = instances.read(numbers)
        mask = arrays.get("label_mask")
        return TokenSet(arrays["input_ids"].reshape(-1).astype(dtype), None if mask is None else mask.reshape(-1))

    numbers = np.arange(len(instances) - count, len(instances))
    return joined(read(numbers[i : i + 64]) for i in range(0, count, 64))
