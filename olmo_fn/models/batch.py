"""What a language model wants of a batch, told in one line: otherwise another loss is trained, or torch fails deep inside."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from olmo_fn.core.chain import IGNORE, Batch

TAKES = ("input_ids", "labels", "documents", "loss_tokens")
INSTEAD = {
    "attention_mask": "padding goes behind the tokens of a row, where nothing attends to it, with labels -100 there; documents "
    "(B, T), numbers that tell the texts of a row apart, keep them from attending to each other",
    "position_ids": "positions begin at 0, and anew in each of the documents (B, T)",
    "cu_seqlens": "documents (B, T), numbers that tell the texts of a row apart, keep them from attending to each other",
}
INSTEAD |= {"token_type_ids": "the model has no types of tokens", "max_seqlen": INSTEAD["cu_seqlens"]}
INSTEAD |= dict.fromkeys(("loss_mask", "label_mask"), "labels are -100 where there is no loss")


def check_form(batch: Batch) -> None:
    """ValueError unless names, shapes and dtypes are ``input_ids`` and ``labels`` (B, T) int64, if given ``documents`` (B, T).

    >>> check_form({"input_ids": torch.zeros(4, dtype=torch.int64), "labels": torch.zeros(4, dtype=torch.int64)})
    Traceback (most recent call last):
    ValueError: input_ids is (4,) int64, and must be (B, T) int64: tokens.view(1, -1) makes one row
    """
    for name in batch:
        if name not in TAKES:
            instead = INSTEAD.get(name, f"it takes {', '.join(TAKES)}")
            raise ValueError(f"batch[{name!r}] is nothing that the model knows; {instead}")
    if "input_ids" not in batch:
        raise ValueError(f"a batch has input_ids and labels (B, T) int64; this one has {', '.join(batch)}")
    ids = batch["input_ids"]
    for name in ("input_ids", "labels", "documents"):
        x = batch.get(name, ids)
        whole = x.dtype == torch.int64 or (name == "documents" and not x.is_floating_point())
        if whole and x.ndim == 2 and x.shape == ids.shape:
            continue
        fix = ".long()" if not whole else ".view(1, -1) makes one row" if x.ndim < 2 else ""
        want = "(B, T) int64" if name == "input_ids" else f"{tuple(ids.shape)} int64, as input_ids is"
        kind = str(x.dtype).removeprefix("torch.")
        raise ValueError(f"{name} is {tuple(x.shape)} {kind}, and must be {want}" + (f": {name}{fix}" if fix else ""))


def check_values(batch: Batch, vocab_size: int) -> None:
    """ValueError for tokens or labels that the vocabulary does not have. It waits for the device that the batch is on."""
    ids, labels = batch["input_ids"], batch.get("labels")
    scored = ids if labels is None else labels.where(labels != IGNORE, 0)
    low, high = torch.stack((ids, scored)).aminmax()
    if int(low) >= 0 and int(high) < vocab_size:
        if torch.equal(ids, scored) and not torch.equal(ids[:, 1:], ids[:, :-1]):
            warnings.warn("labels are equal to input_ids; a label is the token after it: ids[:, :-1], ids[:, 1:]", stacklevel=2)
        return
    for name, x in (("input_ids", ids), ("labels", scored)):
        bad = ((x < 0) | (x >= vocab_size)).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            value = int(x[row, column])
            fix = (
                "where there is no loss a label is -100"
                if name == "labels" and value < 0
                else f"the vocabulary has {vocab_size:,}"
            )
            raise ValueError(f"{name} has {value} at row {row}, position {column}, which is no token; {fix}")


def can_be_read(x: Tensor) -> bool:
    """Whether a tensor's numbers are there to be looked at: not while it is traced, batched by vmap, or abstract."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return type(x) is Tensor and not x.is_meta and not traced and not torch._C._len_torch_dispatch_stack()
