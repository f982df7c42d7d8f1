"""Token healing: go on from the text of a prompt, not from the accident of where its last token ends.

``"def "`` is the tokens ``def`` and a lone space. But text mostly has the space before a word in the word's token: in the
default corpus a lone space follows 2 % of all ``def``, and what comes after it is most often a digit. A model given
the tokens of the prompt goes on from that rare case. Healing gives the last token back, and lets the first new one be
any that begins with its text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from olmo_fn.data.tokenizer import Tokenizer


def heal(tokenizer: Tokenizer, ids: Sequence[int], vocab_size: int) -> tuple[list[int], str, Tensor | None]:
    """``ids`` without the last, its text, and which ids (vocab_size,) begin with it; or ids, "" and None.

    It leaves alone what cannot be healed: a prompt of one token or none, special tokens, a token that is a
    part of a character, and tokenizers that are not byte-level.

    >>> from olmo_fn.data.tokenizer import train_bpe
    >>> tokenizer = train_bpe(["def foo foo"] * 9, 262)
    >>> ids, text, begins = heal(tokenizer, tokenizer.encode("def "), 262)
    >>> tokenizer.decode(ids), text, [tokenizer.decode([i]) for i in begins.nonzero()]
    ('def', ' ', [' ', ' fo', ' foo'])
    """
    untouched = list(ids), "", None
    if len(ids) < 2 or tokenizer.byte_lengths is None:
        return untouched
    special = tokenizer.backend.get_added_tokens_decoder()
    text, token = tokenizer.decode(ids[-1:]), tokenizer.backend.id_to_token(ids[-1])
    if token is None or ids[-1] in special or "\N{REPLACEMENT CHARACTER}" in text:
        return untouched
    begins = torch.zeros(vocab_size, dtype=torch.bool)
    for other, i in tokenizer.backend.get_vocab(with_added_tokens=False).items():
        # A byte-level vocabulary writes each byte as one character, so this compares bytes.
        if other.startswith(token) and i not in special and i < vocab_size:
            begins[i] = True
    return list(ids[:-1]), text, begins
