"""Evaluation is honest: each token is predicted once, from what is before it, with enough context."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from olmo_fn.data.batches import IGNORE
from olmo_fn.data.heldout import eval_batches, num_windows

EOS = 10**6


@settings(deadline=None)
@given(st.data(), st.integers(0, 200), st.integers(1, 20), st.integers(1, 5), st.integers(1, 3))
def test_each_token_is_predicted_once_from_its_own_past(data, n, length, rows, world):
    stride = data.draw(st.integers(1, length))
    tokens = np.arange(n, dtype=np.uint32)  # a token is its own position
    times = np.zeros(n, int)
    batches = [list(eval_batches(tokens, length, stride, rows * world, EOS, r, world)) for r in range(world)]
    assert len({len(b) for b in batches}) == 1
    for batch in (b for rank in batches for b in rank):
        assert batch["input_ids"].shape == batch["labels"].shape == (rows, length)
        assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
        for inputs, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            for i, label in enumerate(labels):
                if label == IGNORE:
                    continue
                times[label] += 1
                seen = inputs[: i + 1]
                assert seen == [EOS if p < 0 else p for p in range(label - len(seen), label)]
                assert len(seen) >= min(label + 1, length - stride + 1)
    assert (times == 1).all()
    assert len(batches[0]) == -(-num_windows(n, length, stride) // (rows * world))


def test_ranks_together_are_the_whole_batch():
    tokens = np.arange(100)
    whole = list(eval_batches(tokens, 8, 4, 6, 0))
    parts = [list(eval_batches(tokens, 8, 4, 6, 0, rank, 2)) for rank in range(2)]
    for batch, *shares in zip(whole, *parts, strict=True):
        for key in batch:
            for rank in range(2):
                assert torch.equal(batch[key][rank::2], shares[rank][key])


@pytest.mark.parametrize("stride", [0, -1, 9])
def test_a_stride_that_would_leave_tokens_out_is_refused(stride):
    with pytest.raises(ValueError, match=f"from 1 to the sequence length 8, not {stride}"):
        eval_batches(np.arange(10), 8, stride, 2, 0)
