"""Evaluation is honest: each token is predicted once, from what is before it, with enough context."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from olmo_fn.core.chain import IGNORE
from olmo_fn.data.heldout import TokenSet, heldout_batches, num_windows

EOS = 10**6


@given(st.data(), st.integers(0, 200), st.integers(1, 20), st.integers(1, 5), st.booleans())
def test_each_token_is_predicted_once_from_its_own_past(data, n, length, rows, mask):
    stride = data.draw(st.integers(1, length))
    tokens = np.arange(n, dtype=np.uint32)  # a token is its own position
    times = np.zeros(n, int)
    batches = list(heldout_batches(TokenSet(tokens), length, stride, rows, EOS, mask))
    for batch in batches:
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
    assert len(batches) == -(-num_windows(n, length, stride) // rows)


def test_documents_of_the_stream():
    """Each row's documents, as in training; the context before the first token is a document of its own."""
    tokens = np.array([1, 2, 0, 3, 0, 4, 5])
    (batch,) = heldout_batches(TokenSet(tokens), 4, 4, 2, eos_id=0, mask_documents=True)
    assert batch["input_ids"].tolist() == [[0, 1, 2, 0], [3, 0, 4, 0]]
    assert batch["documents"].tolist() == [[0, 1, 1, 1], [0, 0, 1, 1]]
    assert batch["labels"].tolist() == [[1, 2, 0, 3], [0, 4, 5, IGNORE]]
    with pytest.raises(ValueError, match="there is no end-of-document id"):
        heldout_batches(TokenSet(tokens), 4, 4, 2, eos_id=None, mask_documents=True)


@pytest.mark.parametrize("stride", [0, -1, 9])
def test_a_stride_that_would_leave_tokens_out_is_refused(stride):
    with pytest.raises(ValueError, match=f"from 1 to the sequence length 8, not {stride}"):
        heldout_batches(TokenSet(np.arange(10)), 8, stride, 2, 0)
