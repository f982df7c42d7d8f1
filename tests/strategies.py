"""All hypothesis strategies of the tests, named after what they make."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from olmo_fn.grad import Batch
from olmo_fn.models.config import Model


@st.composite
def models(draw: st.DrawFn) -> Model:
    """Small transformers: grouped heads, odd depths, windows, tied or not."""
    kv = draw(st.sampled_from([1, 2]))
    heads = kv * draw(st.sampled_from([1, 2]))
    head_dim = draw(st.sampled_from([2, 4]))
    windows = draw(st.sampled_from([(), (3, -1), (2, 5, -1)]))
    return Model(
        d_model=draw(st.sampled_from([6, 8])),
        n_layers=draw(st.integers(1, 3)),
        n_heads=heads,
        n_kv_heads=kv,
        head_dim=head_dim,
        hidden_size=draw(st.sampled_from([5, 8])),
        vocab_size=draw(st.integers(7, 19)),
        window_pattern=windows,
        tie_embeddings=draw(st.booleans()),
        init_std=0.3,
    )


@st.composite
def batches(draw: st.DrawFn, vocab_size: int, rows: int = 4) -> Batch:
    """Token batches with labels masked unevenly, at least one of them left; sometimes with documents."""
    length = draw(st.integers(2, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    ids = torch.randint(vocab_size, (rows, length), generator=generator)
    labels = torch.randint(vocab_size, (rows, length), generator=generator)
    masked = torch.rand(rows, length, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.8]))
    masked[draw(st.integers(0, rows - 1)), draw(st.integers(0, length - 1))] = False
    batch = {"input_ids": ids, "labels": labels.masked_fill(masked, -100)}
    if draw(st.booleans()):
        steps = torch.rand(rows, length, generator=generator) < 0.3
        batch["documents"] = steps.long().cumsum(1)
    return batch


@st.composite
def boxes(draw, shape):
    """A part of a tensor: offset and shape, empty ones included."""
    bounds = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
    return tuple(a for a, _ in bounds), tuple(b - a for a, b in bounds)


def part_of(tensor, box):
    """That part of a tensor."""
    return tensor[tuple(slice(start, start + n) for start, n in zip(*box, strict=True))]
