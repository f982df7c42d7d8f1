"""Whether transformers computes from a directory what we do: the logits of a fixed batch, both in fp32."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olmo_fn import tree
from olmo_fn.formats.huggingface import open_directory
from olmo_fn.models import transformer

ROWS, LENGTH = 2, 64
CLOSE = 1e-3
"""Of the largest logit: what different orders of summation make at most."""


def check_transformers() -> None:
    """ValueError, with what to type, without the package."""
    if find_spec("transformers") is None:
        raise ValueError("--verify needs the package transformers: pip install 'olmo-fn[huggingface]'")


def compare(path: Path) -> tuple[str, bool]:
    """What the largest difference of a logit is, in words, and whether that is rounding."""
    directory = open_directory(path)
    length = min(LENGTH, directory.context or LENGTH)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(directory.model.vocab_size, (ROWS, length), generator=generator)
    expected = their_logits(path, ids)
    params = tree.unflatten((name, directory.parameter(name)) for name in directory.names)
    with torch.no_grad():
        found = transformer.logits(directory.model, params, {"input_ids": ids})
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    same = difference <= CLOSE * largest
    said = f"logits of {ROWS} x {length} tokens differ by at most {difference:.2g} from transformers', of up to {largest:.3g}"
    return f"{said}: {'the same model' if same else 'NOT the same model; please report it, with config.json'}", same


def their_logits(path: Path, ids: Tensor) -> Tensor:
    """Logits (B, T, V) by transformers, fp32."""
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    model = load(path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits
    return logits
