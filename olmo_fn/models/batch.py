"""What a language model wants of a batch, told in one line: otherwise another loss is trained, or torch fails deep inside."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from difflib import get_close_matches

import torch
from torch import Tensor

from olmo_fn.core.chain import IGNORE, Batch
from olmo_fn.core.check import check_batch
from olmo_fn.kernels.attention import document_starts
from olmo_fn.kernels.packing import NAMES, Packing

TAKES = ("input_ids", "labels", "documents", "rows", "sources", "loss_tokens")
INSTEAD = {
    "attention_mask": "padding goes behind the tokens of a row, where nothing attends to it, with labels -100 there; documents "
    "(B, T), numbers that tell the texts of a row apart, keep them from attending to each other",
    "position_ids": "positions begin at 0, and anew in each of the documents (B, T)",
    "cu_seqlens": "documents (B, T), numbers that tell the texts of a row apart, keep them from attending to each other",
}
INSTEAD |= {"token_type_ids": "the model has no types of tokens", "max_seqlen": INSTEAD["cu_seqlens"]}
INSTEAD |= dict.fromkeys(("loss_mask", "label_mask"), "labels are -100 where there is no loss")


def with_packing(batch: Batch, device: torch.device) -> Batch:
    """A batch in host memory as it goes to a device. A GPU's has its documents once more, as kernels for sequences of different
    lengths want them (`Packing`): there one would have to wait for them.
    """
    if device.type != "cuda" or "documents" not in batch:
        return batch
    return {**batch, **Packing.of(document_starts(batch["documents"])).to_batch()}


@dataclass(frozen=True)
class TokenBatch:
    """Refuses, with a ValueError, all but ``input_ids`` and ``labels`` (B, T) int64, and if given ``documents`` (B, T).

    Tokens beyond the vocabulary as well, where it costs no waiting to look: on a CPU, and elsewhere in the first batch of each
    shape.

    >>> TokenBatch(9)({"input_ids": torch.zeros(4, dtype=torch.int64), "labels": torch.zeros(4, dtype=torch.int64)})
    Traceback (most recent call last):
    ValueError: input_ids is (4,) int64, and must be (B, T) int64: input_ids.view(1, -1) makes one row
    """

    vocab_size: int
    labels: bool = True
    """Whether they must be there."""
    seen: set[torch.Size] = field(default_factory=set, compare=False, repr=False)

    def __call__(self, batch: Batch) -> None:
        check_batch(batch)
        self.check_form(batch)
        ids = batch["input_ids"]
        if _can_be_read(ids) and (ids.device.type == "cpu" or ids.shape not in self.seen):
            self.check_values(ids, batch.get("labels"))
            self.seen.add(ids.shape)

    def check_form(self, batch: Batch) -> None:
        """Names, shapes and dtypes."""
        for name in ("input_ids", "labels") if self.labels else ("input_ids",):
            if name not in batch:
                close = get_close_matches(name, batch, 1)
                hint = f": did you mean {name} by {close[0]}?" if close and close[0] not in TAKES else ""
                raise ValueError(f"a batch has input_ids and labels (B, T) int64; this one has {', '.join(batch)}{hint}")
        for name in batch:
            if name not in (*TAKES, *NAMES):
                instead = INSTEAD.get(name, f"it takes {', '.join(TAKES)}")
                raise ValueError(f"batch[{name!r}] is nothing that the model knows; {instead}")
        ids = batch["input_ids"]
        for name in ("rows", "sources"):
            if name in batch and (batch[name].shape != ids.shape[:1] or batch[name].dtype != torch.int64):
                kind = str(batch[name].dtype).removeprefix("torch.")
                raise ValueError(f"{name} is {tuple(batch[name].shape)} {kind}, and must be {tuple(ids.shape[:1])} int64")
        for name in ("input_ids", "labels", "documents"):
            x = batch.get(name, ids)
            whole = x.dtype == torch.int64 or (name == "documents" and not x.is_floating_point())
            if whole and x.ndim == 2 and x.shape == ids.shape:
                continue
            fix = ".view(1, -1) makes one row" if x.ndim < 2 else ".long()" if not whole else ""
            want = "(B, T) int64" if name == "input_ids" else f"{tuple(ids.shape)} int64, as input_ids is"
            kind = str(x.dtype).removeprefix("torch.")
            raise ValueError(f"{name} is {tuple(x.shape)} {kind}, and must be {want}" + (f": {name}{fix}" if fix else ""))

    def check_values(self, ids: Tensor, labels: Tensor | None) -> None:
        """Tokens and labels are in the vocabulary. It waits for the device that they are on."""
        scored = ids if labels is None else labels.where(labels != IGNORE, 0)
        low, high = torch.stack((ids, scored)).aminmax()
        if int(low) >= 0 and int(high) < self.vocab_size:
            if labels is not None and torch.equal(ids, scored) and not torch.equal(ids[:, 1:], ids[:, :-1]):
                warnings.warn(
                    "labels are equal to input_ids; a label is the token after it: ids[:, :-1], ids[:, 1:]", stacklevel=4
                )
            return
        name, x = ("input_ids", ids) if ((ids < 0) | (ids >= self.vocab_size)).any() else ("labels", scored)
        row, column = ((x < 0) | (x >= self.vocab_size)).nonzero()[0].tolist()
        value = int(x[row, column])
        masked = name == "labels" and value < 0
        fix = "where there is no loss a label is -100" if masked else f"the vocabulary has {self.vocab_size:,}"
        raise ValueError(f"{name} has {value} at row {row}, position {column}, which is no token; {fix}")


def _can_be_read(x: Tensor) -> bool:
    """Whether a tensor's numbers are there to be looked at: not while it is traced, batched by vmap, or abstract."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return type(x) is Tensor and not x.is_meta and not traced and not torch._C._len_torch_dispatch_stack()
