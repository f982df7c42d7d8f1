"""What holds on every device, on the CPU and where there is one on a GPU: numbers beside fp64, and bits over a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import batch_of, same_bits
from torch import Tensor

from olmo_fn import tree
from olmo_fn.checkpoint import load, save
from olmo_fn.core.compile import compile
from olmo_fn.core.pipe import accumulate, donate, grad, pipe
from olmo_fn.models import transformer
from olmo_fn.models.config import Model, dense, modified
from olmo_fn.optim import adamw, sgd
from olmo_fn.spec import abstract, init
from olmo_fn.tree import Tree

SMALL = dense(32, 2, 4, 64, vocab_size=64)
MODELS = {"plain": SMALL, "grouped": modified(SMALL, n_kv_heads=2), "windowed": modified(SMALL, window_pattern=(5, -1))}
EXACT = {torch.float32: 1e-5, torch.bfloat16: 0.1}


def moved(model: Model, device: torch.device, dtype: torch.dtype, how: str = "") -> dict[str, Tensor]:
    """What a step of SGD at rate 1 takes off each parameter, its gradient, in fp64 on the CPU; made ``how`` it is said."""
    before = [accumulate(2)] if how == "accumulate" else []
    after = {"donate": [donate()], "compile": [compile()]}.get(how, [])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    params = init(transformer.specs(model), 0, wide)
    step = pipe(
        transformer.loss(model), grad(remat="full" if how == "remat" else "none", dtype=dtype), *before, sgd(1.0), *after
    )
    batch = {name: x.to(device) for name, x in batch_of(model.vocab_size, masked=(0.0, 0.5)).items()}
    state, _ = step(step.init(on(params, device)), batch)
    return {path: (tree.at(params, path) - p.cpu()).double() for path, p in tree.items(state.params)}


def on(params: Tree, device: torch.device) -> Tree:
    return tree.map(lambda p: p.to(device), params)


def near(found: dict[str, Tensor], exact: dict[str, Tensor], tolerance: float) -> None:
    """By norms, but for the rounding of the parameters that the gradient was taken off, whose entries are at most 1."""
    for path, g in exact.items():
        assert (found[path] - g).norm() <= tolerance * g.norm() + 1.2e-7 * g.numel() ** 0.5, path


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_fp64(device: torch.device, name: str, dtype: torch.dtype):
    exact = moved(MODELS[name], torch.device("cpu"), torch.float64)
    near(moved(MODELS[name], device, dtype), exact, EXACT[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["accumulate", "donate", "compile", "remat"])
def test_what_is_invisible_is_so_on_a_gpu(how: str):
    """On a CPU the laws say so."""
    gpu = torch.device("cuda")
    near(moved(SMALL, gpu, torch.float32, how), moved(SMALL, gpu, torch.float32), 1e-5)


def test_a_checkpoint_has_the_bits(device: torch.device, tmp_path: Path):
    step = pipe(transformer.loss(SMALL), grad(), adamw(1e-3))
    batch = {name: x.to(device) for name, x in batch_of(SMALL.vocab_size).items()}
    state, _ = step(step.init(on(init(transformer.specs(SMALL), 0), device)), batch)
    whole = {"step": state.step, "params": state.params, "slots": state.slots}
    save(whole, tmp_path, step=1)
    like = {**whole, "params": abstract(transformer.specs(SMALL))}
    again, _ = load(next(tmp_path.glob("step*")), tree.map(lambda x: torch.empty_like(x, device="meta"), like), device=device)
    for path, x in tree.items(whole):
        assert tree.at(again, path).device.type == device.type
        assert same_bits(tree.at(again, path).cpu(), x.cpu()), path
